"""Evaluation on a CPU: the folded network beside the same network as others run it.

    pytest bench/bench_evaluation.py [--record]

Beside it: module by module in torch's default layout, as most users run it, and in channels_last; and compiled with
freezing, which folds BatchNorm and fuses ReLU6 into the convolutions too (its compiling, about ten seconds a shape of
the input, is not timed). Logits are compared first. Rounds alternate.
"""

from __future__ import annotations

import copy
import time
from statistics import median

import pytest
import torch
from torch import nn

from mnv2 import MobileNetV2, fold
from mnv2.model import InvertedResidual

ROUNDS = 15


class Plain(nn.Module):
    """The network's modules one after the other, in any layout."""

    def __init__(self, model: MobileNetV2):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of pictures."""
        for layer in self.model.features:
            if isinstance(layer, InvertedResidual):
                y = layer.conv(x)
                x = x + y if layer.shape.residual else y
            else:
                x = layer(x)
        return self.model.classifier(x.mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 16])
def test_evaluation_on_a_cpu(batch, record):
    torch.manual_seed(0)
    model = MobileNetV2().eval()
    x = torch.randn(batch, 3, 224, 224)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    plain = Plain(copy.deepcopy(model)).to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        ours = fold(model)
        calls = {
            "ours": lambda: ours(nhwc),
            "eager": lambda: plain(x),
            "eager_channels_last": lambda: model(nhwc),
        }
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model)
        calls["compiled"] = lambda: compiled(nhwc)
        expected = calls["eager_channels_last"]()
        for name, call in calls.items():
            assert torch.allclose(call(), expected, atol=1e-4 * expected.abs().max().item()), name
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) / batch)
    middle = {name: median(seconds) for name, seconds in times.items()}
    ratios = {name: [a / b for a, b in zip(seconds, times["ours"], strict=True)] for name, seconds in times.items()}
    record(
        "evaluation",
        {
            "case": f"alpha 1.0, 224 px, fp32, batch {batch}",
            **{f"{name}_ms_an_image": round(1e3 * seconds, 2) for name, seconds in middle.items()},
            **{f"{name}_over_ours": round(median(ratios[name]), 2) for name in ratios if name != "ours"},
        },
    )
