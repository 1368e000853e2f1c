"""The machine that a run on a GPU was made on, as JSON: GPUs, driver, clocks, free memory, versions.

python -m bench.environment FILE
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mnv2.errors import exit_status

from .results import surroundings

# As ``nvidia-smi --help-query-gpu`` names them.
QUERIED = (
    *("name", "driver_version", "memory.total", "memory.free", "persistence_mode", "power.limit", "temperature.gpu"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def report() -> dict[str, Any]:
    """What is known of this machine; a part that can't be found says why."""
    return {
        **surroundings(["python", "-m", "bench.environment"], on_gpu=torch.cuda.is_available()),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "gpus": [of_gpu(index) for index in range(torch.cuda.device_count())],
        "nvidia_smi": of_nvidia_smi(),
    }


def of_gpu(index: int) -> dict[str, Any]:
    """What torch says of a GPU."""
    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "processors": about.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
    }


def of_nvidia_smi() -> list[dict[str, str]] | str:
    """What the driver says of each GPU, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    if ran.returncode:
        return (ran.stderr or ran.stdout).strip()
    lines = ran.stdout.strip().splitlines()
    return [dict(zip(QUERIED, map(str.strip, line.split(",")), strict=False)) for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.environment", description="Write what this machine is.")
    parser.add_argument("file", metavar="FILE", help="where the JSON is written")
    file = Path(parser.parse_args(argv).file)

    def action() -> None:
        text = json.dumps(report(), indent=2)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
        print(text)

    return exit_status("bench.environment", action)


if __name__ == "__main__":
    sys.exit(main())
