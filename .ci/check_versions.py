"""torch and triton must stay a pair: what pyproject.toml pins, what is installed, and what torch itself asks for.

A CPU build of torch asks for no triton, so the default build's own metadata is looked up in the package index; without
a network that part is left out, and said so.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pinned(requirements: list[str], name: str) -> str | None:
    """The version that ``name==version`` stands at among ``requirements``."""
    for requirement in requirements:
        match = re.match(rf"{name}\s*==\s*([\w.]+)", requirement)
        if match:
            return match.group(1)
    return None


def default_build_requirements(version: str) -> list[str] | None:
    """What the index says that torch's default build needs; None where no index answers."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--report", str(report)]
        # Another Python than this one's: a local or CPU build can't answer for it.
        command += ["--python-version", "3.12", "--only-binary=:all:", "--target", folder, f"torch=={version}"]
        # ... nor may another index, where a CPU build would win.
        environment = {name: value for name, value in os.environ.items() if name != "PIP_EXTRA_INDEX_URL"}
        if subprocess.run(command, capture_output=True, env=environment).returncode:
            return None
        return json.loads(report.read_text())["install"][0]["metadata"].get("requires_dist", [])


def main() -> int:
    """Compare; print one line, or one line for each difference."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    constraints = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pair = {name: pinned(project, name) for name in ("torch", "triton")}
    wrong = []
    for name, version in pair.items():
        if pinned(constraints, name) != version:
            wrong.append(f"{name}: pyproject.toml pins {version}, .ci/constraints.txt {pinned(constraints, name)}")
        installed = metadata.version(name).partition("+")[0]
        if installed != version:
            wrong.append(f"{name}: pyproject.toml pins {version}, but {installed} is installed")
    asked = default_build_requirements(str(pair["torch"]))
    asked = metadata.requires("torch") if asked is None else asked
    triton = pinned(asked or [], "triton")
    if triton not in (None, pair["triton"]):
        wrong.append(f"triton: pyproject.toml pins {pair['triton']}, but torch {pair['torch']} asks for {triton}")
    for line in wrong:
        print(f"versions: {line}", file=sys.stderr)
    if not wrong:
        source = "torch's default build asks for that triton" if triton else "torch's own word could not be had here"
        print(f"versions: torch {pair['torch']} and triton {pair['triton']} are pinned and installed; {source}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
