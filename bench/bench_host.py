"""Host time of an operation: what a call costs before the GPU has anything to do.

    pytest bench/bench_host.py [--record]

The kernels are not launched (their part, Triton's own launcher, needs a GPU), all else is as in training: checks, the
operations' dispatch, allocation, autograd. Beside it torch's convolution on the same tensors of 8 channels by 4 by 4
pixels, whose arithmetic takes about a microsecond. Rounds alternate.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import pytest
import torch

from kernels import common, depthwise_conv2d, reference

CALLS = 1000
ROUNDS = 9


def microseconds(call) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


@pytest.mark.parametrize("kind", ["inference", "forward", "forward and backward"])
def test_depthwise(kind, record, monkeypatch):
    monkeypatch.setattr(common.Launch, "run", lambda launch, device: None)
    monkeypatch.setattr(common, "INTERPRETED", True)  # takes CPU tensors
    training = kind != "inference"
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_(training)
    weight = torch.randn(8, 1, 3, 3).requires_grad_(training)
    dy = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)

    def call(op):
        y = op(x, weight)
        if kind == "forward and backward":
            torch.autograd.grad(y, (x, weight), dy)

    ops = {"ours": partial(depthwise_conv2d, backend="triton"), "torch": reference.depthwise_conv2d}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in ops}
    for _ in range(ROUNDS):
        for name, op in ops.items():
            times[name].append(microseconds(partial(call, op)))
    torch.set_num_threads(threads)
    ours, torchs = times["ours"], times["torch"]
    ratios = sorted(a / b for a, b in zip(ours, torchs, strict=True))
    record(
        "host",
        {
            "case": f"depthwise, {kind}",
            "ours_microseconds": round(median(ours), 1),
            "torch_cpu_microseconds": round(median(torchs), 1),
            "ratio_min_median_max": [round(r, 2) for r in (ratios[0], median(ratios), ratios[-1])],
        },
    )
