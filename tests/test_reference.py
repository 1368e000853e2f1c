"""The torch twin of the block, held to the same block written with torch's modules, in fp64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels import BatchNorm, reference


def norm_of(module: nn.BatchNorm2d) -> BatchNorm:
    return BatchNorm(
        module.weight,
        module.bias,
        module.running_mean,
        module.running_var,
        module.num_batches_tracked,
        module.training or module.running_mean is None,
        module.momentum,
        module.eps,
    )


class Block(nn.Module):
    """The inverted residual as a chain of torch's own modules, padding written out."""

    def __init__(self, c_in, ratio, c_out, stride, padding, **norm):
        super().__init__()
        c_mid = c_in * ratio
        self.stride, self.padding, self.residual = stride, padding, stride == 1 and c_in == c_out
        self.expand = nn.Conv2d(c_in, c_mid, 1, bias=False) if ratio > 1 else None
        self.expand_norm = nn.BatchNorm2d(c_mid, **norm) if ratio > 1 else None
        self.depthwise = nn.Conv2d(c_mid, c_mid, 3, stride, 0, groups=c_mid, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(c_mid, **norm)
        self.project = nn.Conv2d(c_mid, c_out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(c_out, **norm)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.7, 1.1)

    def forward(self, x):
        a = x if self.expand is None else self.expand_norm(self.expand(x)).clamp(0, 6)
        if self.padding == "same" and self.stride == 2:
            pads = [(1, 1) if size % 2 else (0, 1) for size in (x.shape[3], x.shape[2])]
        else:
            pads = [(1, 1), (1, 1)]
        d = self.depthwise(F.pad(a, (*pads[0], *pads[1])))
        y = self.project_norm(self.project(self.depthwise_norm(d).clamp(0, 6)))
        return x + y if self.residual else y

    def arguments(self):
        expand = (None, None) if self.expand is None else (self.expand.weight, norm_of(self.expand_norm))
        return (
            *expand,
            self.depthwise.weight,
            norm_of(self.depthwise_norm),
            self.project.weight,
            norm_of(self.project_norm),
        )


def picture(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


# (batch, height, width, c_in, ratio, c_out, stride), each with its purpose
SHAPES = {
    "residual": (2, 7, 7, 8, 6, 8, 1),
    "widening": (2, 7, 7, 8, 6, 16, 1),
    "downsampling": (2, 8, 8, 8, 6, 12, 2),
    "odd-at-stride-2": (2, 7, 9, 8, 6, 12, 2),
    "odd-and-even-at-stride-2": (2, 7, 8, 8, 6, 12, 2),
    "expand-ratio-1": (2, 6, 6, 8, 1, 16, 1),
    "batch-1": (1, 5, 6, 8, 6, 8, 1),
    "channels-no-power-of-2": (2, 4, 5, 10, 3, 7, 2),
    "one-row": (3, 1, 6, 8, 2, 8, 1),
}


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("training", [True, False], ids=["batch-statistics", "running-statistics"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_block_of_modules(shape, training, padding):
    n, h, w, c_in, ratio, c_out, stride = shape
    block = Block(c_in, ratio, c_out, stride, padding).double().train(training)
    twin = copy.deepcopy(block)
    x = picture(n, c_in, h, w).requires_grad_()
    x_twin = x.detach().clone().requires_grad_()

    expected = block(x)
    got = reference.inverted_residual(
        x_twin, *twin.arguments(), stride=stride, residual=block.residual, padding=padding
    )
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    grad = torch.randn_like(expected)
    expected.backward(grad)
    got.backward(grad)
    torch.testing.assert_close(x_twin.grad, x.grad, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, p), q in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norm_follows_torchs_options(options):
    module = nn.BatchNorm2d(6, eps=1e-3, **options).double()
    twin = copy.deepcopy(module)
    for step, training in itertools.product(range(3), (True, False)):
        module.train(training)
        twin.train(training)
        x = picture(4, 6, 3, 5) * (step + 1) + step
        torch.testing.assert_close(reference.batch_norm(x, norm_of(twin)), module(x), rtol=1e-12, atol=1e-12)
    for p, q in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(q, p)


@pytest.mark.parametrize("size", [4, 5, 8, 9, 224, 225])
def test_same_padding_is_tensorflows(size):
    """TensorFlow pads max((ceil(n / s) - 1) s + k - n, 0) zeros, the smaller half in front."""
    x = torch.arange(1.0, size + 1).expand(1, 1, size, size).contiguous(memory_format=torch.channels_last)
    middle = torch.zeros(1, 1, 3, 3)
    middle[0, 0, 1, 0] = 1  # passes on the column before the centre
    got = reference.conv2d(x, middle, stride=2, padding="same")[0, 0, 0]
    outputs = -(-size // 2)
    front = max((outputs - 1) * 2 + 3 - size, 0) // 2
    columns = [2 * i - front for i in range(outputs)]
    assert got.tolist() == [float(c + 1) if 0 <= c < size else 0.0 for c in columns]


def arguments(**changes):
    block = Block(8, 6, 8, 1, "symmetric").double()
    given = dict(zip(("x", "w1", "n1", "wd", "nd", "w2", "n2"), (picture(2, 8, 5, 5), *block.arguments()), strict=True))
    given.update(stride=1, residual=True, padding="symmetric")
    given.update(changes)
    return [given.pop(key) for key in ("x", "w1", "n1", "wd", "nd", "w2", "n2")], given


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(2, 8, 5, 5)}, ValueError, "x: expected channels_last"),
        ({"x": torch.randn(8, 5, 5)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.ones(2, 8, 5, 5, dtype=torch.int32)}, TypeError, "x: expected a floating-point"),
        ({"stride": 3}, ValueError, "stride: expected 1 or 2, got 3"),
        ({"stride": 2}, ValueError, "residual: expected stride 1"),
        ({"n1": None}, ValueError, "expand_weight, expand_norm: expected both or neither"),
        ({"padding": "valid"}, ValueError, "padding: expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(changes, error, message):
    positional, keywords = arguments(**changes)
    with pytest.raises(error, match=message):
        reference.inverted_residual(*positional, **keywords)
