"""The whole network on a GPU, inference and a step of training: ours, eager in channels_last, and ``torch.compile``.

    pytest bench/bench_network.py [--all] [--quick] [--record]

Pictures a second, and peak memory beyond weights and pictures. Each side is timed as it is called, and as a replay of a
CUDA graph, which leaves the host's time out. Results are compared first, rounds alternate (``bench/network_cases.py``).

By default alpha 1.0 at 224, at inference with a batch of 1 too; the widest at inference, and the smallest network in
both. ``--all`` takes all 22 published variants.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from bench.gpu_tools import checked
from bench.network_cases import NetworkJob, network_case, row_of
from mnv2.model import VARIANTS

INFERENCE = {256: {(1.0, 224), (1.4, 224), (0.35, 96)}, 1: {(1.0, 224)}}  # by default, by batch
TRAINING = {128: {(1.0, 224), (0.35, 96)}}


def jobs(batches: dict[int, set[tuple[float, int]]], *, training: bool) -> Iterator[pytest.param]:
    """Every variant with each batch."""
    for batch, default in batches.items():
        for variant in ((alpha, resize) for alpha, sides in VARIANTS.items() for resize in sides):
            job = NetworkJob(*variant, batch, training)
            marks = [] if variant in default else [pytest.mark.exhaustive]
            yield pytest.param(job, id=job.name(batch), marks=marks)


@pytest.fixture
def measure(tools, side_by_side, record):
    """Check a network, time it, and record its figures."""

    def run(job: NetworkJob) -> None:
        case = checked(functools.partial(network_case, job, tools), job.batch)
        record("network", row_of(case, side_by_side(case.calls, tools.rounds, tools.clock), tools))

    return run


@pytest.mark.benchmark(group="Is inference faster?")
@pytest.mark.parametrize("job", [*jobs(INFERENCE, training=False)])
def test_inference(job, measure):
    measure(job)


@pytest.mark.benchmark(group="Is a step of training faster?")
@pytest.mark.parametrize("job", [*jobs(TRAINING, training=True)])
def test_training_step(job, measure):
    measure(job)
