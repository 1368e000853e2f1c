"""Compile a network's kernels before its first batch, which would wait minutes for them without a word."""

from __future__ import annotations

import time
from collections.abc import Callable

from .distributed import World


def warm_up(compile_kernels: Callable[..., int], world: World) -> None:
    """Compile on the first process of each machine, and tell; the others find the kernels in Triton's cache.

    ``compile_kernels`` is a network's ``warmup`` with all its arguments but ``progress``.
    """
    if world.device.type != "cuda":
        return
    first = not world.device.index
    start = time.perf_counter()
    count = compile_kernels(progress=world.rank == 0) if first else 0
    world.wait()
    if not first:
        compile_kernels(progress=False)
    if count:
        world.print(f"{count} kernels compiled in {time.perf_counter() - start:.0f} s")
