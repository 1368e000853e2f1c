"""What all benchmarks share: where results go, and what is written beside them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mnv2.logs import versions

RESULTS = Path(__file__).resolve().parent / "results"


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the figures to bench/results/")


def surroundings() -> dict[str, Any]:
    """Command, commit, versions and device of this run."""
    commit, changes = (
        subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent.parent).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", ":!bench/results"))
    )
    return {
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "commit": commit + ("-dirty" if changes else ""),
        "versions": versions("pillow"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": len(os.sched_getaffinity(0)),
    }


def processor() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


@pytest.fixture
def record(request) -> Callable[[str, dict[str, Any]], None]:
    """Print a row of figures, and with --record put it into ``bench/results/NAME.json``."""

    def write(name: str, row: dict[str, Any]) -> None:
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
        if not request.config.getoption("--record"):
            return
        path = RESULTS / f"{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [old for old in rows if old["case"] != row["case"]] + [{**row, **surroundings()}]
        path.write_text(json.dumps({"rows": rows}, indent=2) + "\n")

    return write
