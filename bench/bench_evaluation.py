"""Evaluation on a CPU: the folded network beside the same network, with the same weights, as others run it.

    pytest bench/bench_evaluation.py -s [--record]

Beside it timm's and transformers' networks, and our own unfolded, each in two ways: eager under inference_mode in
torch's default layout, as their users run them (ours in channels_last, as it is made); and compiled with freezing,
which folds BatchNorm and fuses ReLU6 into the convolutions too, in channels_last (of both layouts, tried once on each
network and batch, it was from 6% faster to 3% slower). Compiling, about ten seconds a shape, is not timed. The folded
network takes pictures in channels_last, as our loader makes them. Logits are compared first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from bench import peers
from bench.timing import ratio_of, significant
from mnv2 import MobileNetV2, fold

RESIZE = 224
ROUNDS = {1: 60, 16: 15, 64: 7}  # by batch; 64 is what validate.py takes by default


def call_of(network: nn.Module, pictures: Tensor, mode: Callable = torch.inference_mode) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with mode():
            return network(pictures)

    return call


def compiled(network: nn.Module) -> nn.Module:
    """``network`` as torch.compile makes it for one shape; it is made at the first call."""
    torch._dynamo.reset()
    network = copy.deepcopy(network).to(memory_format=torch.channels_last)
    return torch.compile(network, dynamic=False)


@pytest.mark.parametrize("peer", [*peers.PEERS, "unfolded"])
@pytest.mark.parametrize("batch", ROUNDS)
def test_evaluation_on_a_cpu(batch, peer, benchmark, side_by_side, record):
    benchmark.group = f"evaluation of alpha 1.0 at {RESIZE} on a CPU, batch {batch}"
    if peer in peers.PEERS:
        peers.require(peer)
    torch.manual_seed(0)
    model = peers.with_statistics(MobileNetV2(), torch.randn(8, 3, RESIZE, RESIZE))
    theirs = model if peer == "unfolded" else peers.network(peer, model)
    pictures = torch.randn(batch, 3, RESIZE, RESIZE)
    nhwc = pictures.contiguous(memory_format=torch.channels_last)
    calls = {
        "ours": call_of(fold(model), nhwc),
        "eager": call_of(theirs, nhwc if peer == "unfolded" else pictures),
        "compiled": call_of(compiled(theirs), nhwc, torch.no_grad),  # which freezing wants
    }
    with torch.no_grad():
        expected = model(nhwc)
    with torch._inductor.config.patch(freezing=True):  # read at the first call
        for name, call in calls.items():
            torch.testing.assert_close(call(), expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=name)
    seconds = side_by_side(calls, ROUNDS[batch])
    per_image = 1e3 / batch
    figures = {f"{name}_ms_an_image": significant(per_image * median(times)) for name, times in seconds.items()}
    record(
        "evaluation",
        {
            "case": f"alpha 1.0, {RESIZE} px, fp32, batch {batch}, beside {peer}",
            **figures,
            "ratios": [
                ratio_of(
                    f"evaluation on a CPU, batch {batch}: {peer}, {way}",
                    seconds["ours"],
                    seconds[way],
                    "ms an image",
                    per_image,
                )
                for way in ("eager", "compiled")
            ],
        },
    )
