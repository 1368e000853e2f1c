"""Compile a network's kernels before its first batch, which would wait minutes for them without a word."""

from __future__ import annotations

import time
from typing import Protocol

import torch

from .distributed import World


class Warmable(Protocol):
    """A network that knows its kernels."""

    def warmup(self, batch: int, resize: int, dtype: torch.dtype | None = None, *, progress: bool = True) -> int:
        """Compile what batches of up to ``batch`` pictures of side ``resize`` run; the number of kernels."""


def warm_up(network: Warmable, world: World, batch: int, resize: int, dtype: torch.dtype) -> None:
    """Compile on the first process of each machine, and tell; the others find the kernels in Triton's cache."""
    if world.device.type != "cuda":
        return
    first = not world.device.index
    start = time.perf_counter()
    count = network.warmup(batch, resize, dtype, progress=world.rank == 0) if first else 0
    world.wait()
    if not first:
        network.warmup(batch, resize, dtype, progress=False)
    if count:
        world.print(f"{count} kernels compiled in {time.perf_counter() - start:.0f} s")
