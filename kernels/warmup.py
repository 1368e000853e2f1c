"""Compile kernels before they are needed, on all cores: a network's first batch would wait minutes for them."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from tqdm import tqdm

from .common import INTERPRETED, Launch


def compile_ahead(
    launches: Iterable[Launch], device: torch.device, *, progress: bool = True, ignore_errors: bool = False
) -> int:
    """Compile what ``launches`` would run on ``device`` and haven't compiled yet; the number of them.

    Triton keeps the result in memory and in its cache on disk (``TRITON_CACHE_DIR``, else ``~/.triton/cache``). With
    ``progress`` a bar is shown on a terminal. With ``ignore_errors`` a kernel that doesn't compile raises where it is
    launched. Where there is no GPU, or kernels are interpreted, nothing is compiled.
    """
    if device.type != "cuda" or INTERPRETED:
        return 0
    # In a context of its own, as Triton leaves its mode on there where a kernel doesn't compile.
    return contextvars.copy_context().run(_compile, list(launches), device, progress, ignore_errors)


def _compile(launches: list[Launch], device: torch.device, progress: bool, ignore_errors: bool) -> int:
    workers = len(os.sched_getaffinity(0))
    bar = tqdm(desc="compiling kernels", total=0, leave=False, disable=None if progress else True)
    pool = ThreadPoolExecutor(workers)
    compiling = triton.AsyncCompileMode(pool, ignore_errors=ignore_errors)
    with torch.cuda.device(device), bar, pool, compiling as mode:
        for launch in launches:
            known = len(mode.raw_futures)
            options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
            launch.kernel.warmup(**launch.arguments, **options, grid=launch.grid)
            for future in mode.raw_futures[known:]:
                bar.total += 1
                future.add_done_callback(lambda _: bar.update())
    return len(mode.raw_futures)
