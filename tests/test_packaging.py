"""What is installed: the right packages, the right versions, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mnv2

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_pair_of_versions_is_the_one_installed():
    pins = dict(requirement.split(";")[0].split("==") for requirement in PROJECT["dependencies"] if "==" in requirement)
    assert set(pins) == {"torch", "triton"}
    for name, version in pins.items():
        assert metadata.version(name).partition("+")[0] == version
    asked = [line for line in metadata.requires("torch") or [] if line.startswith("triton")]
    assert all(line.startswith(f"triton=={pins['triton']}") for line in asked)


def test_the_version_is_told_once():
    assert mnv2.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_extras_are_there():
    assert {"cuda13", "cuda12", "test", "bench", "export", "tensorboard"} <= set(PROJECT["optional-dependencies"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of what git would give, without a network."""
    source = tmp_path_factory.mktemp("source of the wheel")
    names = ["kernels", "mnv2", "bench", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE"]
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(source), str(source)], check=True, capture_output=True)
    return next(source.glob("*.whl"))


def test_the_wheel_holds_the_two_packages_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"kernels", "mnv2", f"mnv2-{PROJECT['version']}.dist-info"}
    for name in ("mnv2/imagenet_classes.tsv", "mnv2/py.typed", "kernels/py.typed", "kernels/README.md"):
        assert name in names


def test_the_wheel_works_where_it_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    words = "import mnv2, mnv2.labels; print(mnv2.__file__, len(mnv2.labels.imagenet_classes()))"
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == [str(tmp_path / "mnv2" / "__init__.py"), "1000"]


@pytest.mark.parametrize("kind", ["package", "module", "empty folder"])
def test_the_wrong_kernels_package_is_named(tmp_path, kind):
    (tmp_path / "kernels").mkdir()
    if kind == "package":
        (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    elif kind == "module":
        (tmp_path / "kernels").rmdir()
        (tmp_path / "kernels.py").write_text("")
    (tmp_path / "mnv2").symlink_to(ROOT / "mnv2")
    done = subprocess.run([sys.executable, "-c", "import mnv2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: mnv2 needs its own package 'kernels', but Python found another")
    assert "pip uninstall kernels" in last


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, relative imports left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_point_one_way():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported(path) & {"mnv2", "bench", "tests", "train", "validate"}, path
    for path in (ROOT / "mnv2").rglob("*.py"):
        assert not imported(path) & {"bench", "tests", "train", "validate"}, path


def test_the_network_needs_no_loader():
    """Serving installs mnv2 without DALI, scikit-learn, Pillow and ONNX."""
    packages = "'nvidia', 'nvidia.dali', 'sklearn', 'PIL', 'pytest', 'onnx', 'onnxruntime', 'onnxscript'"
    absent = f"import sys; sys.modules.update(dict.fromkeys(({packages})))"
    names = "kernels, mnv2, mnv2.model, mnv2.labels, mnv2.config, mnv2.export"
    subprocess.run([sys.executable, "-c", f"{absent}; import {names}"], cwd=ROOT, check=True)
