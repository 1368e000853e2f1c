"""Host time: what a call costs before the GPU has anything to do.

    pytest bench/bench_host.py -s [--record]

The kernels are not launched (their part, Triton's own launcher, needs a GPU); all else is as in use: checks, the
operations' dispatch, the choice of tiles and grids, allocation, autograd. So nothing is computed, and results are
compared by shape and type alone; their numbers are the tests' business. Beside it torch's operations on the
same tensors, so small that their arithmetic is a few per cent: 4 by 4 pixels of 8 channels, expanded to 48, for an
operation, pictures of 32 by 32 for the network of alpha 0.35, whose layers are as many as any other's. Theirs include
arithmetic and the CPU's own dispatch, which isn't a GPU's; stem and classifier are torch's in both. One thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Call, Clock, ratio_of, significant
from kernels import (
    BatchNorm,
    common,
    depthwise_conv2d,
    inverted_residual,
    inverted_residual_inference,
    pack_inverted_residual,
)
from mnv2 import MobileNetV2, fold

ROUNDS = 9
SIDES = {"ours": "triton", "torch": "torch"}  # and the backend that each is
C, C_MID, SIDE = 8, 48, 4
TRAINING = ("forward", "forward and backward")


@pytest.fixture
def unlaunched(monkeypatch):
    """Kernels take CPU tensors, and launching one does nothing."""
    monkeypatch.setattr(common.Launch, "run", lambda launch, device: None)
    monkeypatch.setattr(common, "INTERPRETED", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(unlaunched, benchmark, side_by_side, record) -> Callable[[str, dict[str, Call], int], None]:
    """Compare calls by what they return, time rounds of ``calls`` calls and record microseconds a call."""

    def run(case: str, sides: dict[str, Call], calls: int) -> None:
        benchmark.group = f"host time of {calls} calls: {case}"
        forms = [[(t.shape, t.dtype) for t in call()] for call in sides.values()]
        assert forms[0] == forms[1]
        seconds = side_by_side(sides, ROUNDS, clock_of(calls))
        figures = {f"{name}_us_a_call": significant(1e6 * median(times)) for name, times in seconds.items()}
        ratio = ratio_of(f"host, {case}", seconds["ours"], seconds["torch"], "us a call", 1e6)
        record("host", {"case": case, **figures, "ratios": [ratio]})

    return run


def clock_of(calls: int) -> Clock:
    """Seconds of one call, the mean of so many."""

    def clock(call: Call) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return clock


def nhwc(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(grad)


def results(op: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor | None) -> list[Tensor]:
    """Output of ``op``, and with ``dy`` the gradients of ``inputs``."""
    y = op()
    return [y] if dy is None else [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("kind", ["inference", *TRAINING])
def test_depthwise(kind, measure):
    inputs = [nhwc(1, C, SIDE, SIDE, grad=kind != "inference"), torch.randn(C, 1, 3, 3)]
    inputs[1].requires_grad_(kind != "inference")
    dy = nhwc(1, C, SIDE, SIDE) if kind == "forward and backward" else None
    sides = {
        name: partial(results, partial(depthwise_conv2d, *inputs, backend=backend), inputs, dy)
        for name, backend in SIDES.items()
    }
    measure(f"depthwise, {kind}", sides, 500)


def test_block_at_inference(measure):
    weights = (C_MID, C, 1, 1), (C_MID,), (C_MID, 1, 3, 3), (C_MID,), (C, C_MID, 1, 1), (C,)
    packed, x = pack_inverted_residual(*map(torch.randn, weights), dtype=torch.float32), nhwc(1, C, SIDE, SIDE)

    def call(backend: str) -> list[Tensor]:
        return [inverted_residual_inference(x, packed, stride=1, residual=True, backend=backend)]

    measure("block, inference", {name: partial(call, backend) for name, backend in SIDES.items()}, 200)


@pytest.mark.parametrize("kind", TRAINING)
def test_block_in_training(kind, measure):
    def norm(channels: int) -> BatchNorm:
        ones, zeros = torch.ones(channels), torch.zeros(channels)
        affine = ones.clone().requires_grad_(), zeros.clone().requires_grad_()
        return BatchNorm(*affine, zeros, ones, torch.tensor(0), batch_stats=True)

    x = nhwc(1, C, SIDE, SIDE, grad=True)
    weights = [
        torch.randn(shape, requires_grad=True) for shape in ((C_MID, C, 1, 1), (C_MID, 1, 3, 3), (C, C_MID, 1, 1))
    ]
    norms = [norm(C_MID), norm(C_MID), norm(C)]
    inputs = [x, *weights, *(tensor for norm in norms for tensor in norm[:2])]
    operands: Any = [operand for pair in zip(weights, norms, strict=True) for operand in pair]
    dy = nhwc(1, C, SIDE, SIDE) if kind == "forward and backward" else None
    sides = {
        name: partial(
            results, partial(inverted_residual, x, *operands, stride=1, residual=True, backend=backend), inputs, dy
        )
        for name, backend in SIDES.items()
    }
    measure(f"block, {kind}", sides, 50)


def test_network_at_inference(measure):
    """The folded network; torch's is the network as it was trained, which is how it is served without folding."""
    model, x = MobileNetV2(0.35, num_classes=10).eval(), nhwc(1, 3, 32, 32)
    folded = fold(model)
    folded.backend, model.backend = "triton", "torch"

    def call(network: torch.nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [network(x)]

    measure("network, inference", {"ours": partial(call, folded), "torch": partial(call, model)}, 10)


def test_training_step(measure):
    """Forward, loss, backward and SGD's step with momentum, in torch's way in both."""
    x, labels = nhwc(2, 3, 32, 32), torch.tensor([3, 7])

    def step_of(backend: str) -> Call:
        model = MobileNetV2(0.35, num_classes=10, backend=backend).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> list[Tensor]:
            logits = model(x)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            return [logits]

        return step

    measure("network, training step", {name: step_of(backend) for name, backend in SIDES.items()}, 3)
