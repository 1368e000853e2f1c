"""Everything that needs a GPU, in order: tests, DALI's GPU pipeline, tuning, benchmarks, training, report.

    python -m bench.gpu [--minutes 30] [--again]

Steps are those of ``bench/gpu_steps.py``. The first that fails stops the run, with a line that says what to do. What
is finished is kept in ``build/gpu/state.json`` by commit and GPU: the next run goes on behind it, and one at another
commit, on another GPU or with ``--again`` starts anew. ``--minutes`` is shared out among the steps, and what one
leaves over the later ones have; a step that takes longer has failed. From 30 on the tests take every case and the
benchmarks all their rounds. What a step prints goes to ``build/gpu/NN-name.log``, and its end to the screen.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mnv2.errors import InputError, exit_status
from mnv2.flags import option, parse

from .gpu_steps import FOLDER, steps
from .gpu_tools import missing_gpu
from .steps import ROOT, run_steps


@dataclass(frozen=True)
class GpuConfig:
    """How long all may take, and whether what is finished is done again."""

    minutes: float = option(30.0, "minutes for all steps together")
    again: bool = option(False, "do everything again")

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise InputError(f"--minutes: expected a positive number, got {self.minutes}")


def key_of_run() -> dict[str, str]:
    """Commit, without regard to what has changed since, as tuning changes files; and the GPU's name."""
    try:
        ran = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        commit = ran.stdout.strip()
    except OSError:
        commit = ""
    return {"commit": commit, "device": torch.cuda.get_device_name()}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(GpuConfig, argv, "Run everything that needs a GPU.")
    status = 0

    def action() -> None:
        if problem := missing_gpu():
            raise InputError(f"{problem}, so nothing was run")
        nonlocal status
        status = run_steps(steps(config.minutes), FOLDER, key_of_run(), again=config.again)

    return exit_status("bench.gpu", action) or status


if __name__ == "__main__":
    sys.exit(main())
