"""The depthwise convolution: every number against fp64, and everything that can be asked of it wrongly.

The shapes go with the tile: strips of up to 4 columns, 8 strips and 32 channels a program, rows from 8 on in chunks.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_parity
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import depthwise, depthwise_conv2d, partials, reference
from mnv2.model import layer_shapes

CASES = {
    "one pixel": (1, 8, 1, 1),
    "two by two": (2, 16, 2, 2),
    "one row": (1, 8, 1, 11),
    "one column": (1, 8, 11, 1),
    "three chunks of rows, the last short": (1, 8, 23, 3),
    "every mask partial": (3, 40, 5, 10),
    "channels that fill no vector": (2, 3, 7, 6),
    "every block full": (1, 32, 8, 32),
    "odd height, even width": (2, 8, 9, 12),
    "even height, odd width": (1, 12, 10, 7),
}
GEOMETRIES = {"s1": (1, "symmetric"), "s2": (2, "symmetric"), "s2 same": (2, "same")}


def network_shapes():
    """Every distinct depthwise shape of two networks at sizes small enough to interpret, paddings and batches."""
    for alpha, resize in ((1.0, 32), (1.0, 33), (0.35, 64), (0.35, 35)):
        for layer in layer_shapes(alpha, resize):
            if layer.kind == "block":
                for padding in ("symmetric", "same") if layer.stride == 2 else ("symmetric",):
                    for batch in (1, 3):
                        yield (batch, layer.c_mid, layer.height, layer.width), layer.stride, padding


def cases():
    for name, shape in CASES.items():
        for geometry, (stride, padding) in GEOMETRIES.items():
            yield pytest.param(shape, stride, padding, id=f"{name}, {geometry}")
    for shape, stride, padding in sorted(set(network_shapes())):
        name = "x".join(map(str, shape))
        yield pytest.param(shape, stride, padding, id=f"{name}, s{stride} {padding}", marks=pytest.mark.exhaustive)


def operands(shape, dtype, device, stride=1):
    N, C, H, W = shape
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(C, 1, 3, 3, device=device).to(dtype)
    dy = torch.randn(N, C, -(-H // stride), -(-W // stride), device=device).to(dtype)
    return x, weight, dy.contiguous(memory_format=torch.channels_last)


def kernels(x, weight, stride, padding):
    return depthwise_conv2d(x, weight, stride=stride, padding=padding, backend="triton")


def torchs(x, weight, stride, padding):
    return reference.depthwise_conv2d(x, weight, stride=stride, padding=padding)


def results(op, x, weight, dy, stride, padding):
    """Output and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = op(x, weight, stride, padding)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize(("shape", "stride", "padding"), list(cases()))
def test_output_and_gradients(shape, stride, padding, dtype, device, place):
    x, weight, dy = map(place, operands(shape, dtype, device, stride))
    got = results(kernels, x, weight, dy, stride, padding)
    truth = results(torchs, x.double(), weight.double(), dy.double(), stride, padding)
    torch_same_type = results(torchs, x, weight, dy, stride, padding)
    for name, *values in zip(("y", "dx", "dw"), got, truth, torch_same_type, strict=True):
        assert_parity(name, *values)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)


class Calls(TorchDispatchMode):
    """Names of the project's operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mnv2":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wanted", ["x", "weight", "both"])
def test_only_the_gradient_that_is_needed_is_computed_and_only_what_it_needs_saved(
    wanted, stride, dtype, device, place
):
    x, weight, dy = map(place, operands((2, 8, 9, 6), dtype, device, stride))
    _, *both = results(kernels, x, weight, dy, stride, "symmetric")
    _, *truth = results(torchs, x.double(), weight.double(), dy.double(), stride, "symmetric")
    x.requires_grad_(wanted != "weight"), weight.requires_grad_(wanted != "x")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = kernels(x, weight, stride, "symmetric")
    with Calls() as calls:
        y.backward(dy)
    op = {"x": "depthwise_input_grad", "weight": "depthwise_weight_grad", "both": "depthwise_grads"}[wanted]
    assert calls.names == [op]
    assert (x.shape in saved) == (wanted != "x")
    for name, leaf, exact, other in zip(("dx", "dw"), (x, weight), truth, both, strict=True):
        if leaf.requires_grad:
            assert_parity(name, leaf.grad, exact, other)
        else:
            assert leaf.grad is None


def test_two_runs_give_the_same_bits(dtype, device, place):
    x, weight, dy = map(place, operands((1, 8, 19, 5), dtype, device))
    first, second = (results(kernels, x, weight, dy, 1, "symmetric") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_partial_sums_of_more_than_one_block(device, place):
    values = place(torch.randn(513, 9, 7, device=device))
    got = partials.sum_partials(values, torch.float32)
    assert_parity("sum", got, values.double().sum(0).t(), values.sum(0).t())


def test_no_programs_sum_to_zero(device, place):
    assert torch.equal(partials.sum_partials(torch.empty(0, 9, 4, device=device), torch.float16).cpu(), torch.zeros(4, 9).half())


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch(stride, dtype, device, place):
    x, weight, dy = operands((0, 8, 5, 6), dtype, device, stride)
    y, dx, dw = results(kernels, x, weight, dy, stride, "symmetric")
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    assert torch.equal(dw, torch.zeros_like(weight))


# Memory that is asked for and not touched costs nothing, so offsets can be large where a program's own part is small.
FAR = {
    "the last image": ((8, 32, 2_400_000, 4), {"chunks": 1, "ROWS": 4}),
    "the last row": ((1, 2**27, 6, 4), {"chunks": 1, "ROWS": 5}),
}


@pytest.mark.parametrize(("shape", "sizes"), FAR.values(), ids=FAR.keys())
def test_offsets_beyond_2_to_the_31(shape, sizes, request):
    if request.config.getoption("--sanitize") or torch.cuda.is_available():
        pytest.skip("needs memory that is only reserved: the interpreter's")
    N, C, H, W = shape
    x, y, dx = (torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last) for _ in range(3))
    rows = sizes["ROWS"]
    near = operands((N, 32, rows + 1, W), torch.float16, "cpu")[0]
    x[:, :32, : rows + 1] = near
    weight = torch.randn(32, 1, 3, 3).half()
    assert x.numel() > 2**31
    forward = depthwise.depthwise_fwd_launch(x, weight, y, 1, "symmetric")
    backward = depthwise.depthwise_bwd_launch(x, None, weight, dx, 1, "symmetric")
    for launch in (forward, backward):
        launch.kernel[(1, 1)](**{**launch.arguments, **sizes})
    want = torchs(near.double(), weight.double(), 1, "symmetric")[:, :, : rows - 1]
    want_dx = torchs(near.double(), weight.double().flip(2, 3), 1, "symmetric")[:, :, : rows - 1]
    for name, got, truth in (("y", y, want), ("dx", dx, want_dx)):
        assert_parity(name, got[:, :32, : rows - 1], truth, truth.half())
