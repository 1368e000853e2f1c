"""The arithmetic of a run: how many bits, and whether it gives the same ones each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype(precision: str) -> torch.dtype:
    """The type that ``precision`` names."""
    return _DTYPES[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Where the network computes in ``precision``: "fp32" as it is, "fp16" or "bf16" by ``torch.autocast``."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def input_dtype(precision: str) -> torch.dtype:
    """What the loader hands over: half of the bytes where the first convolution would round them anyway."""
    return torch.float16 if precision == "fp16" else torch.float32


@contextmanager
def numerics(deterministic: bool) -> Iterator[None]:
    """Algorithms that give the same bits each time, or the fastest that cuDNN finds, inside the ``with`` statement."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
