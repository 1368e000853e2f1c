"""Clocks for benchmarks, and rounds that alternate between what is compared.

A clock is a function from a call to the seconds that it took. What is compared is timed in turns, one round of each
side after the other, so that all sides meet the same machine; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]

CACHE_BYTES = 256 * 2**20  # more than any GPU's L2 holds
HELD_BACK = 4  # times that it is written before a call: so long the host may be ahead of the GPU
COPIED_BYTES = 2**30


def wall_clock(call: Call) -> float:
    """Seconds of ``call`` on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaClock:
    """Seconds of a call on a GPU between two events, with nothing of its tensors in L2.

    Before the call a buffer larger than L2 is written, several times: while the GPU does that, the host launches what
    the call has to launch, and gaps between launches don't count unless the host takes longer than that.
    ``held_back`` is how many times.
    """

    def __init__(self, device: torch.device, held_back: int = HELD_BACK):
        self._device = device
        self._held_back = held_back
        self._buffer = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self._held_back):
            self._buffer.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / 1e3


def alternate(calls: Mapping[str, Call], rounds: int, clock: Clock = wall_clock) -> dict[str, list[float]]:
    """Seconds of each of ``calls`` in each of ``rounds``, by name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock(call))
    return seconds


def ratio_of(name: str, ours: list[float], theirs: list[float], unit: str, scale: float = 1.0) -> dict[str, Any]:
    """``ours`` over ``theirs``, costs of the same rounds: medians in ``unit`` (``scale`` times the cost), and a ratio.

    The ratio is the median of the rounds', beside the smallest and the largest; under 1 ours costs less.
    """
    ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
    return {
        "name": name,
        "ours": significant(median(ours) * scale),
        "theirs": significant(median(theirs) * scale),
        "ratio": significant(median(ratios)),
        "ratio_min_max": [significant(ratios[0]), significant(ratios[-1])],
        "unit": unit,
    }


def significant(value: float, digits: int = 4) -> float:
    """``value`` to so many significant digits, as results have it."""
    return float(f"{value:.{digits}g}")


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second that ``device`` reads and writes in a copy: what a kernel bound by memory can reach."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = CudaClock(device)
    clock(lambda: target.copy_(source))
    return 2 * COPIED_BYTES / median(clock(lambda: target.copy_(source)) for _ in range(rounds))
