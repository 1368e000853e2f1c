"""What is measured, as JSON in ``bench/results/``: a file a suite, with where and by which command each row was found.

    {"rows": [{"case": ..., figures, "ratios": [...], "command": ..., "commit": ..., "versions": ..., "device": ...}],
     "ratios": [{"name": ..., "ours": ..., "theirs": ..., "ratio": ..., "ratio_min_max": ..., "unit": ...}]}

A row is known by its case and device: measuring it again replaces it, and results of several devices lie side by side.
``ratios`` are those of all rows, ours over theirs, where both are costs: under 1 ours is the cheaper one.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mnv2.errors import InputError
from mnv2.logs import versions

from .files import replace_file

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("pillow", "timm", "transformers")


def surroundings(command: Sequence[str], *, on_gpu: bool) -> dict[str, Any]:
    """Command, commit, versions and device of this run, which is the processor unless it is ``on_gpu``."""
    return {
        "command": shlex.join(command),
        "commit": commit(),
        "versions": versions(*PEERS),
        "device": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def commit() -> str:
    """The commit that is checked out, "-dirty" behind it where files other than results have changed, or "unknown"."""
    try:
        found, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent.parent).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", ":!bench/results"))
        )
    except OSError:  # there is no git
        return "unknown"
    return found + ("-dirty" if changes else "") if found else "unknown"


def processor_name() -> str:
    """The processor's name, or where the system doesn't tell it its architecture."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of results, none where there is no such file.

    Raises:
        InputError: the file isn't one of results.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            row["case"], row["device"]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected results of benchmarks, got {type(error).__name__}: {error}") from None
    return rows


def merge(path: Path, row: Mapping[str, Any]) -> None:
    """Put ``row`` into the file of results at ``path``, in place of the one of its case and device."""
    rows = [old for old in read(path) if (old["case"], old["device"]) != (row["case"], row["device"])] + [dict(row)]
    ratios = [{**ratio, "device": row["device"]} for row in rows for ratio in row.get("ratios", [])]
    replace_file(path, json.dumps({"rows": rows, "ratios": ratios}, indent=2) + "\n")
