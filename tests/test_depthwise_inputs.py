"""The depthwise convolution given what it can't take: an error that names it, or under "auto" torch's convolution."""

from __future__ import annotations

import contextlib

import pytest
import torch
from numerics import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import common, depthwise_conv2d, reference


def nhwc(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


WRONG = {  # for every backend
    "integers": ((nhwc(1, 8, 4, 4).int(), torch.zeros(8, 1, 3, 3)), {}, TypeError, "x: expected a floating-point"),
    "dimensions": ((torch.zeros(8, 4, 4), torch.zeros(8, 1, 3, 3)), {}, ValueError, "x: expected 4 dimensions"),
    "channels": (
        (nhwc(1, 8, 4, 4), torch.zeros(16, 1, 3, 3)),
        {},
        ValueError,
        r"weight: expected \[8, 1, 3, 3\], one filter for each channel of x, got shape \(16, 1, 3, 3\)",
    ),
    "groups": ((nhwc(1, 8, 4, 4), torch.zeros(8, 2, 3, 3)), {}, ValueError, r"weight: expected \[8, 1, 3, 3\]"),
    "two types": (
        (nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3).half()),
        {},
        TypeError,
        r"weight: expected x's type torch.float32 \(or autocast\), got torch.float16",
    ),
    "two devices": (
        (nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3, device="meta")),
        {},
        ValueError,
        "weight: expected x's device cpu, got meta",
    ),
    "no tensor": ((None, torch.zeros(8, 1, 3, 3)), {}, TypeError, "x: expected a tensor, got NoneType"),
    "no weight": ((nhwc(1, 8, 4, 4), None), {}, TypeError, "weight: expected a tensor, got NoneType"),
    "no channels": ((nhwc(1, 0, 4, 4), torch.zeros(0, 1, 3, 3)), {}, ValueError, "x: expected C, H and W of at least"),
    "3x5": ((nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 5)), {}, ValueError, r"weight: expected \[8, 1, 3, 3\]"),
    "2x2": ((nhwc(1, 8, 4, 4), torch.zeros(8, 1, 2, 2)), {}, ValueError, r"weight: expected \[8, 1, 3, 3\]"),
    "integer weight": (
        (nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3).int()),
        {},
        TypeError,
        "weight: expected x's type torch.float32 .* got torch.int32",
    ),
    "stride 0": ((nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)), {"stride": 0}, ValueError, "stride: expected 1 or 2"),
    "stride pair": (
        (nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)),
        {"stride": (1, 1)},
        ValueError,
        r"stride: expected 1 or 2, got \(1, 1\)",
    ),
    "padding": (
        (nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)),
        {"padding": "valid"},
        ValueError,
        "padding: expected one of .*, got 'valid'",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize(("tensors", "options", "error", "match"), WRONG.values(), ids=WRONG.keys())
def test_what_no_backend_can_run(tensors, options, error, match, backend):
    with pytest.raises(error, match=match):
        depthwise_conv2d(*tensors, **options, backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of .*, got 'cuda'"):
        depthwise_conv2d(nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3), backend="cuda")


UNSUPPORTED = {  # by the kernels
    "fp64": (lambda: (nhwc(1, 8, 4, 4).double(), torch.ones(8, 1, 3, 3).double()), {}, "x: expected float16"),
    "NCHW": (
        lambda: (torch.zeros(2, 8, 4, 4), torch.ones(8, 1, 3, 3)),
        {},
        "x: expected channels_last .* convert once",
    ),
    "some channels": (lambda: (nhwc(2, 16, 4, 4)[:, :8], torch.ones(8, 1, 3, 3)), {}, "x: expected channels_last"),
    "5x5": (lambda: (nhwc(1, 8, 6, 6), torch.ones(8, 1, 5, 5)), {}, "weight: expected a kernel of 3 x 3, got 5 x 5"),
    "weight's strides": (
        lambda: (nhwc(1, 8, 4, 4), torch.ones(8, 1, 3, 3).transpose(2, 3)),
        {},
        r"weight: expected contiguous memory, got strides \(9, 9, 1, 3\)",
    ),
    "two million channels": (
        lambda: (nhwc(1, 2**21, 1, 1), torch.ones(2**21, 1, 3, 3)),
        {},
        "x: expected at most 1048560 channels, got 2097152",
    ),
    "stride 3": (lambda: (nhwc(1, 8, 6, 6), torch.ones(8, 1, 3, 3)), {"stride": 3}, "stride: expected 1 or 2, got 3"),
}


@pytest.mark.parametrize(("make", "options", "match"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_the_kernels_refuse_runs_by_torch_under_auto(make, options, match, device):
    with device:
        x, weight = make()
    x.normal_()
    with pytest.raises(ValueError, match=match):
        depthwise_conv2d(x, weight, **options, backend="triton")
    with Calls() as calls:
        y = depthwise_conv2d(x, weight, **options)
    assert calls.names == []
    assert torch.equal(y, reference.depthwise_conv2d(x, weight, **options))


def test_auto_leaves_a_cpu_to_torch_even_where_the_interpreter_could_run_it(device):
    with device, Calls() as calls:
        depthwise_conv2d(nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3))
    assert calls.names == ([] if device.type == "cpu" else ["depthwise_fwd"])


def test_meta_and_fake_tensors():
    for device, mode in (("meta", contextlib.nullcontext()), ("cuda", FakeTensorMode())):
        with mode:
            x = torch.empty(1, 8, 4, 4, device=device, memory_format=torch.channels_last)
            assert depthwise_conv2d(x, torch.empty(8, 1, 3, 3, device=device), stride=2).shape == (1, 8, 2, 2)


def test_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    x, weight = nhwc(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)
    with pytest.raises(ValueError, match=r"x: expected an NVIDIA GPU \(or a CPU with TRITON_INTERPRET=1\), got cpu"):
        depthwise_conv2d(x, weight, backend="triton")
    assert torch.equal(depthwise_conv2d(x, weight), torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize(
    ("hip", "capability", "match"),
    [
        (None, (7, 5), "x: expected a GPU of compute capability 8.0 or newer, got 7.5 (Old GPU)"),
        ("7.0", (9, 4), "x: expected an NVIDIA GPU, got Old GPU"),
        (None, (8, 0), None),
    ],
)
def test_unsupported_gpus(hip, capability, match, monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(common, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = common.unsupported_device(torch.device("cuda:0"))
    assert problem == (match and match.removeprefix("x: "))
