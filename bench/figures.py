"""What the reports of a network's counted figures have in common: checks of its sizes, and their record."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mnv2.errors import InputError
from mnv2.logs import versions
from mnv2.model import check_alpha


def check_sizes(alpha: float, **positive: int) -> None:
    """Raise InputError unless ``alpha`` is a width multiplier and the others, by their names, are positive."""
    for name, value in positive.items():
        if value < 1:
            raise InputError(f"{name}: expected a positive integer, got {value}")
    try:
        check_alpha(alpha)
    except ValueError as error:
        raise InputError(str(error)) from None


def device_called(name: str) -> torch.device:
    """The CPU, or the current GPU; InputError where torch sees none."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device: expected a GPU that torch sees, got none")
    return torch.device("cuda", torch.cuda.current_device())


def run_interpreted(module: str, words: Sequence[str], *, quiet: bool = False) -> int:
    """Run ``python -m module words`` with Triton's interpreter; its exit status. ``quiet`` drops what it prints.

    Triton reads the variable where kernels are defined, so it takes a process of its own.
    """
    command = [sys.executable, "-m", module, *words]
    variables = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=variables, stdout=subprocess.DEVNULL if quiet else None).returncode


def write(path: str, module: str, words: Sequence[str], figures: dict[str, Any]) -> None:
    """Write ``figures`` as JSON with the command that found them and the versions of what it ran on."""
    command = shlex.join(["python", "-m", module, *words])
    with open(path, "w") as file:
        file.write(json.dumps({**figures, "command": command, "versions": versions()}, indent=2) + "\n")
