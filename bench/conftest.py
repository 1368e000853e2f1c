"""What all benchmarks share: where results go, and the rounds that pytest-benchmark reports."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_tools, results, timing
from bench.parity import ieee
from mnv2.errors import InputError

ROUNDS, QUICK_ROUNDS = 30, 10  # on a GPU


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the figures to bench/results/")
    parser.addoption("--record-to", metavar="DIR", help="write the figures to DIR")
    parser.addoption("--quick", action="store_true", help="fewer rounds on a GPU")
    with suppress(ValueError):  # the tests have it too, where both folders are named
        parser.addoption("--all", action="store_true", help="every case, where the default is a reasoned sample")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


@pytest.fixture(scope="session")
def gpu():
    """The GPU of a benchmark that needs one, where cuDNN looks for the fastest algorithm and fp32 is IEEE."""
    if problem := gpu_tools.missing_gpu():
        pytest.skip(problem)
    with ieee(benchmark=True):
        yield torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def tools(request, gpu) -> gpu_tools.Tools:
    """What measures on the GPU."""
    return gpu_tools.on_gpu(gpu, rounds=QUICK_ROUNDS if request.config.getoption("--quick") else ROUNDS)


@pytest.fixture
def record(request) -> Callable[[str, dict[str, Any]], None]:
    """Print a row of figures and its ratios; with --record put it into ``bench/results/SUITE.json``."""
    folder = request.config.getoption("--record-to")
    target = results.RESULTS if folder is None else Path(folder)
    wanted = folder is not None or request.config.getoption("--record")
    if wanted:  # before minutes are spent on measuring
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            raise InputError(f"--record: expected a folder that can be written to, got {target}")

    def write(suite: str, row: dict[str, Any]) -> None:
        figures = {name: value for name, value in row.items() if name != "ratios"}
        print(f"\n{suite}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
        for ratio in row.get("ratios", []):
            print("  {name}: ours {ours:g}, theirs {theirs:g} {unit}, ratio {ratio:g}".format(**ratio))
        if wanted:
            about = results.surroundings(["pytest", *sys.argv[1:]], on_gpu="gpu" in request.fixturenames)
            results.merge(target / f"{suite}.json", {**row, **about})

    return write


@pytest.fixture
def side_by_side(benchmark) -> Callable[..., dict[str, list[float]]]:
    """Seconds of calls by name in alternating rounds, as ``timing.alternate``.

    The call named "ours" is what pytest-benchmark reports.
    """

    def run(
        calls: Mapping[str, timing.Call], rounds: int, clock: timing.Clock = timing.wall_clock
    ) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in calls}

        def turn(names: list[str]) -> None:
            for name in names:
                seconds[name].append(clock(calls[name]))

        others = [name for name in calls if name != "ours"]
        benchmark.pedantic(turn, args=(["ours"],), setup=lambda: turn(others), rounds=rounds)
        return seconds

    return run
