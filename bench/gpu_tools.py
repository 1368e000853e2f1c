"""What benchmarks on a GPU have in common: the tools that measure, and a case, which is checked before it is timed.

A case is some calls of the same work by name, "ours" and its peers. ``checked`` runs each once and holds the results to
the truth; ``timed`` times them in alternating rounds and makes a row of figures. What needs a GPU is in ``Tools``, so
that all else runs anywhere.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from kernels import common
from kernels.roofline import bounds, device_of
from mnv2.errors import RunError

from . import timing
from .count import Call as PlannedLaunch
from .timing import Call, significant

MIB = 2**20
GRAPH = "_graph"  # behind the name of a call: the same as a replay of a CUDA graph, without the host's time
WARM_UPS = 3


@dataclass(frozen=True)
class Tools:
    """How calls are measured on ``device``, whose copies move ``bandwidth`` bytes a second.

    ``compiled`` is ``torch.compile``, ``graphed`` makes a call that replays what another has launched, and ``peak``
    gives the bytes of memory that a call takes at most.
    """

    device: torch.device
    clock: timing.Clock
    bandwidth: float
    rounds: int
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    graphed: Callable[[Call], Call]
    peak: Callable[[Call], int]


def on_gpu(device: torch.device, rounds: int) -> Tools:
    """Tools that measure on ``device``."""
    return Tools(
        device=device,
        clock=timing.CudaClock(device),
        bandwidth=timing.copy_bandwidth(device),
        rounds=rounds,
        compiled=compiled,
        graphed=partial(graphed, device=device),
        peak=partial(peak_bytes, device=device),
    )


def missing_gpu() -> str | None:
    """Why benchmarks on a GPU can't run here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    if common.INTERPRETED:
        return "needs compiled kernels, TRITON_INTERPRET=1 is set"
    problem = common.unsupported_device(torch.device("cuda", torch.cuda.current_device()))
    return None if problem is None else f"needs another GPU: {problem}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through ``torch.compile`` for the shapes of its first call, whole or with an error.

    What was compiled before is forgotten: from the eighth shape of a function on torch would run it uncompiled.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def graphed(call: Call, device: torch.device) -> Call:
    """A call that replays the launches of ``call`` and returns what it has returned, with the new numbers."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # which is left even where a capture fails
        for _ in range(WARM_UPS):  # whatever is made at a first call must be there before the capture
            call()
        gc.collect()  # nothing may be freed that is found in the middle of the capture
        with torch.cuda.graph(graph, stream=stream):
            result = call()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of tensors that were there at once in ``call``, beyond those that were there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Counted:
    """Bytes that our launches touch by their formulas, and the seconds that they take at least, for which ``binds``."""

    touched: int
    seconds: float
    binds: str


def counted(
    launches: Iterable[PlannedLaunch], device: torch.device, facts: Sequence[Mapping[str, Any] | None] = ()
) -> Counted:
    """What is counted of ``launches``, with ``facts`` of their compiled kernels where those are on record."""
    launches = list(launches)
    known = facts or [None] * len(launches)
    limits = []
    for (_, launch, formula), found in zip(launches, known, strict=True):
        trips = launch.trips if found is None else found["trips"]
        limits.append(bounds(device_of(device), found, math.prod(launch.grid), trips, formula.touched))
    binds = "bytes alone" if None in known else max(limits, key=max).binds
    return Counted(sum(call.formula.touched for call in launches), math.fsum(map(max, limits)), binds)


@dataclass(frozen=True)
class Case:
    """The same work by several ``calls``, whose results by name ``check`` holds to the truth or raises."""

    name: str
    batch: int
    calls: Mapping[str, Call]
    check: Callable[[Mapping[str, Any]], None]
    counted: Counted


def with_graphs(calls: Mapping[str, Call], tools: Tools) -> dict[str, Call]:
    """``calls``, and each as a graph's replay."""
    return {**calls, **{name + GRAPH: tools.graphed(call) for name, call in calls.items()}}


def checked(build: Callable[[int], Case], batch: int) -> Case:
    """The case that ``build`` makes of ``batch`` pictures, of half as many where memory is short, once it is right.

    Raises:
        AssertionError: a result isn't what it must be.
        RunError: a single picture is too large for the device.
    """
    while batch:
        try:
            return _checked(build, batch)
        except torch.OutOfMemoryError as error:
            problem = str(error).partition("\n")[0]
        batch //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise RunError(f"one picture takes more memory than there is: {problem}")


def _checked(build: Callable[[int], Case], batch: int) -> Case:
    """The case of so many pictures; a function of its own, as what it has made goes with it where memory is short."""
    torch.manual_seed(0)
    case = build(batch)
    case.check({name: call() for name, call in case.calls.items()})
    return case


def peers(calls: Mapping[str, Call]) -> list[tuple[str, str]]:
    """Names of the calls to be compared: ours and a peer, or both as a graph's replay."""
    pairs = []
    for name in calls:
        mine = "ours" + GRAPH if name.endswith(GRAPH) else "ours"
        if name != mine:
            pairs.append((mine, name))
    return pairs


def ratios(
    case: str, seconds: Mapping[str, list[float]], unit: str, scale: float, what: str = "time"
) -> list[dict[str, Any]]:
    """Ours over each peer's."""
    return [
        timing.ratio_of(f"{case}: {what} of {mine} over {peer}", seconds[mine], seconds[peer], unit, scale)
        for mine, peer in peers(seconds)
    ]


def timed(case: Case, tools: Tools, side_by_side: Callable[..., dict[str, list[float]]]) -> dict[str, Any]:
    """Time a checked case; its row of figures.

    The rate is of bytes by our formulas (``counted_mb``), by the replay where that takes less. What starts with
    ``bound`` is counted and not measured.
    """
    seconds = side_by_side(case.calls, tools.rounds, tools.clock)
    best = min(median(seconds[name]) for name in ("ours", "ours" + GRAPH) if name in seconds)
    rate = case.counted.touched / best
    return {
        "case": case.name,
        **{f"{name}_us": significant(1e6 * median(times)) for name, times in seconds.items()},
        "gb_per_s": significant(rate / 1e9),
        "share_of_copy": significant(rate / tools.bandwidth),
        "copy_gb_per_s": significant(tools.bandwidth / 1e9),
        "counted_mb": significant(case.counted.touched / 1e6),
        "bound_us": significant(1e6 * case.counted.seconds),
        "bound_by": case.counted.binds,
        "ratios": ratios(case.name, seconds, "us", 1e6),
    }
