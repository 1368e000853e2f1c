"""The depthwise convolution as a module, and its way into networks of others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from numerics import Calls
from torch import nn

from kernels import DepthwiseConv2d, replace_depthwise
from mnv2 import MobileNetV2

DEPTHWISE = {"kernel_size": 3, "padding": 1, "groups": 8}


class Conv2dSame(nn.Conv2d):
    """As timm writes it: TensorFlow's padding, worked out at each call."""

    def forward(self, x):
        pads = [max((-(-n // s) - 1) * s + 3 - n, 0) for n, s in zip(x.shape[2:], self.stride, strict=True)]
        x = nn.functional.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


Conv2dSame.__module__ = "timm.layers.conv2d_same"


class Net(nn.Module):
    """Every kind of convolution that a network of others may hold."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8)),
            nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU()),
        )
        self.same = Conv2dSame(8, 8, 3, 2, groups=8, bias=False)
        self.wide = nn.Conv2d(8, 8, 5, 1, 2, groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.again = self.blocks[0][0]

    def forward(self, x):
        x = self.same(self.blocks(self.stem(x)))
        return self.again(self.grouped(self.dilated(self.wide(x))))


def test_it_is_nn_conv2d_but_for_how_it_runs(device):
    torch.manual_seed(1)
    ours = DepthwiseConv2d(8, 8, **DEPTHWISE, stride=2, device=device, backend="triton")
    torch.manual_seed(1)
    theirs = nn.Conv2d(8, 8, **DEPTHWISE, stride=2, device=device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 7, 6, device=device).contiguous(memory_format=torch.channels_last)
    with Calls() as kernels:
        y, expected = ours(x), theirs(x)
    assert kernels.names == ["depthwise_fwd"]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward(), expected.square().sum().backward()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    assert repr(ours) == repr(theirs).replace("Conv2d(", "DepthwiseConv2d(")[:-1] + ", backend='triton')"
    assert repr(pickle.loads(pickle.dumps(copy.deepcopy(ours)))) == repr(ours)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"groups": 4}, "groups: expected 8 for a depthwise 3x3 convolution, got 4"),
        ({"groups": 1}, "groups: expected 8 "),
        ({"out_channels": 16}, "out_channels: expected 8 .* got 16"),
        ({"kernel_size": 5}, r"kernel_size: expected \(3, 3\) .* got \(5, 5\)"),
        ({"stride": 3}, r"stride: expected \(1, 1\) or \(2, 2\) .* got \(3, 3\)"),
        ({"stride": (1, 2)}, r"stride: .* got \(1, 2\)"),
        ({"dilation": 2}, r"dilation: expected \(1, 1\) .* got \(2, 2\)"),
        ({"padding": 0}, r"padding: expected \(1, 1\) or same .* got \(0, 0\)"),
        ({"padding_mode": "reflect"}, "padding_mode: expected zeros .* got 'reflect'"),
        ({"backend": "cudnn"}, "backend: expected one of"),
    ],
)
def test_arguments_of_another_convolution(options, match):
    with pytest.raises(ValueError, match=match):
        DepthwiseConv2d(**{"in_channels": 8, "out_channels": 8, **DEPTHWISE, **options})


def test_a_network_of_others(device):
    net = Net().to(device, memory_format=torch.channels_last).eval()
    ours = copy.deepcopy(net)
    calls = []
    ours.blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    parameters = dict(ours.named_parameters())

    replacement = replace_depthwise(ours, backend="triton")

    assert replacement.swapped == ("blocks.0.0", "blocks.1.0", "same", "again")
    assert set(replacement.kept) == {"wide", "dilated", "grouped"}
    assert str(replacement).splitlines() == [
        "4 depthwise convolutions swapped: blocks.0.0, blocks.1.0, same, again",
        "kept wide: kernel_size: expected (3, 3) for a depthwise 3x3 convolution, got (5, 5)",
        "kept dilated: dilation: expected (1, 1) for a depthwise 3x3 convolution, got (2, 2)",
        "kept grouped: groups: expected 8 for a depthwise 3x3 convolution, got 2",
    ]
    assert ours.again is ours.blocks[0][0]
    assert dict(ours.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in ours.named_parameters())
    assert not ours.same.training
    x = torch.randn(1, 3, 13, 16, device=device).contiguous(memory_format=torch.channels_last)
    with Calls() as kernels:
        y = ours(x)
    assert kernels.names == 4 * ["depthwise_fwd"]
    assert calls == [1, 1]
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)


def test_a_second_time_swaps_nothing():
    net = Net()
    replace_depthwise(net)
    assert replace_depthwise(net).swapped == ()


def test_what_is_not_plainly_nn_conv2d_is_kept():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x * 2)

    conv = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
    net = nn.ModuleDict({"scaled": Scaled(8, 8, 3, 1, 1, groups=8)})
    assert replace_depthwise(net).kept == {"scaled": f"its class is {__name__}.Scaled, not nn.Conv2d"}
    compiled, hooked = nn.Conv2d(8, 8, **DEPTHWISE), nn.Conv2d(8, 8, **DEPTHWISE)
    compiled.compile()
    hooked.forward = hooked.forward
    kept = replace_depthwise(nn.ModuleList([compiled, hooked])).kept
    assert kept == dict.fromkeys(("0", "1"), "its forward has been replaced or compiled")
    assert replace_depthwise(conv).kept == {"": "it is the model itself"}
    assert replace_depthwise(MobileNetV2(0.35)).swapped == ()  # it has a backend of its own


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of"):
        replace_depthwise(Net(), backend="cudnn")
