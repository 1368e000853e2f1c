"""The depthwise convolution: every number against fp64, and everything that can be asked of it wrongly.

The shapes go with the tiles: strips of 4 columns (of 2 where the last would idle), 8 strips by 64 channels, 16 by 32 or
32 by 16 a program, rows from 9 on in chunks.
"""

from __future__ import annotations

import pytest
import torch
from numerics import Calls

from bench.parity import assert_parity
from kernels import DepthwiseConv2d, depthwise, depthwise_conv2d, depthwise_passes, partials, reference
from mnv2.model import layer_shapes

CASES = {
    "one pixel": (1, 8, 1, 1),
    "two by two": (2, 16, 2, 2),
    "one row": (1, 8, 1, 11),
    "one column": (1, 8, 11, 1),
    "three chunks of rows, the last short": (1, 8, 23, 3),
    "every mask partial": (7, 40, 5, 9),  # 35 strips, the last columns outside, 8 channels over
    "channels that fill no vector": (2, 3, 7, 6),
    "every block of 32 channels full": (2, 32, 8, 32),
    "two blocks of 64 channels": (1, 128, 3, 9),
    "several programs in rows and strips": (12, 8, 18, 6),
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
    for number, (name, shape) in enumerate(CASES.items()):
        for geometry, (stride, padding) in GEOMETRIES.items():
            if padding == "same" and shape[2] % 2 and shape[3] % 2:
                continue  # of odd sides it is the symmetric one
            marks = [pytest.mark.one_type] if number % 3 else []  # every third in each type
            yield pytest.param(shape, stride, padding, id=f"{name}, {geometry}", marks=marks)
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


def check(shape, stride, padding, dtype, device, memory):
    """Hold output and gradients of fresh inputs to fp64."""
    x, weight, dy = map(memory.place, operands(shape, dtype, device, stride))
    got = results(kernels, x, weight, dy, stride, padding)
    truth = results(torchs, x.double(), weight.double(), dy.double(), stride, padding)
    # In fp32 and then rounded, as cuDNN: on a CPU torch's weight gradient in bf16 reads memory that nobody wrote where
    # an image is lower or narrower than the taps.
    rounded = (result.to(dtype) for result in results(torchs, x.float(), weight.float(), dy.float(), stride, padding))
    for name, *values in zip(("y", "dx", "dw"), got, truth, rounded, strict=True):
        assert_parity(name, *values)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    assert got[2].stride() == weight.stride()
    memory.check()


@pytest.mark.parametrize(("shape", "stride", "padding"), list(cases()))
def test_output_and_gradients(shape, stride, padding, dtype, device, memory):
    check(shape, stride, padding, dtype, device, memory)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("wanted", ["x", "weight", "both"])
def test_only_the_gradient_that_is_needed_is_computed_and_only_what_it_needs_saved(
    wanted, stride, dtype, device, memory
):
    x, weight, dy = map(memory.place, operands((2, 8, 9, 6), dtype, device, stride))
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


def test_two_runs_give_the_same_bits(dtype, device, memory):
    x, weight, dy = map(memory.place, operands((1, 8, 19, 5), dtype, device))
    first, second = (results(kernels, x, weight, dy, 1, "symmetric") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_partial_sums_of_more_than_one_block(device, memory):
    values = memory.place(torch.randn(513, 9, 7, device=device))
    got = partials.sum_partials(values, torch.empty(7, 9, device=device))
    assert_parity("sum", got, values.double().sum(0).t(), values.sum(0).t())


def test_no_programs_sum_to_zero(device, memory):
    weight = torch.empty(4, 9, device=device, dtype=torch.float16)
    assert partials.sum_partials(torch.empty(0, 9, 4, device=device), weight).eq(0).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_empty_batch(stride, dtype, device, memory):
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
def test_offsets_beyond_2_to_the_31(shape, sizes, device):
    N, _, _, W = shape
    half = {"dtype": torch.float16, "device": device}
    x, y, dx = (torch.empty(shape, **half, memory_format=torch.channels_last) for _ in range(3))
    rows = sizes["ROWS"]
    near = operands((N, 32, rows + 1, W), torch.float16, device)[0]
    x[:, :32, : rows + 1] = near
    weight = torch.randn(32, 1, 3, 3, **half)
    assert x.numel() > 2**31
    forward = depthwise_passes.depthwise_fwd_launch(x, weight, y, 1, "symmetric")
    backward = depthwise_passes.depthwise_bwd_launch(x, None, weight, dx, 1, "symmetric")
    for launch in (forward, backward):
        launch._replace(grid=(1, 1), arguments={**launch.arguments, **sizes}).run(device)
    want = torchs(near.double(), weight.double(), 1, "symmetric")[:, :, : rows - 1]
    want_dx = torchs(near.double(), weight.double().flip(2, 3), 1, "symmetric")[:, :, : rows - 1]
    for name, got, truth in (("y", y, want), ("dx", dx, want_dx)):
        assert_parity(name, got[:, :32, : rows - 1], truth, truth.half())


# What torch asks of an operation.


def test_operations_are_what_they_declare(device):
    x, weight, dy = operands((2, 8, 5, 6), torch.float32, device, 2)
    torch.library.opcheck(depthwise.depthwise_fwd, (x, weight, 2, "same"))
    torch.library.opcheck(depthwise.depthwise_input_grad, (dy, weight, 5, 6, 2, "same"))
    torch.library.opcheck(depthwise.depthwise_weight_grad, (dy, x, weight, 2, "same"))
    torch.library.opcheck(depthwise.depthwise_grads, (dy, x, weight, 2, "same"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic, device):
    x, weight, dy = operands((2, 8, 5, 6), torch.float32, device, 2)
    compiled = torch.compile(kernels, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    want = results(kernels, x, weight, dy, 2, "symmetric")
    assert all(map(torch.equal, results(compiled, x, weight, dy, 2, "symmetric"), want))


def test_exported_with_any_batch(device):
    module = DepthwiseConv2d(8, 8, 3, 2, 1, groups=8, backend="triton", device=device)
    x = operands((2, 8, 5, 6), torch.float32, device)[0]
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = operands((3, 8, 5, 6), torch.float32, device)[0]
    assert torch.equal(exported.module()(more), module(more))
    exported.module()(more).square().sum().backward()  # it can be trained, too


def test_a_gradient_of_a_gradient_is_refused(device):
    x, weight, _ = operands((1, 8, 3, 3), torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(kernels(x, weight, 1, "symmetric").square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients can't be differentiated again; take backend='torch'"):
        dx.sum().backward()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast(half, device):
    x, weight, _ = operands((2, 8, 6, 5), torch.float32, device)
    x.requires_grad_(), weight.requires_grad_()
    with torch.autocast(device.type, half):
        y = kernels(x, weight, 1, "symmetric")
        torch_y = torchs(x, weight, 1, "symmetric")
    assert_parity("y", y, torchs(x.to(half).double(), weight.to(half).double(), 1, "symmetric"), torch_y)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
    rounded = results(torchs, x.to(half).double(), weight.to(half).double(), dy.double(), 1, "symmetric")[2]
    # fp32 as it was summed, where torch rounds it to half precision on the way
    assert_parity("dw", weight.grad, rounded, rounded.float())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_weight_in_fp32_is_rounded_to_the_type_of_x(half, device):
    x = torch.ones(1, 8, 3, 3, dtype=half, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.full((8, 1, 3, 3), 1 + torch.finfo(half).eps / 4, device=device)
    with torch.autocast(device.type, half):
        y = kernels(x, weight, 1, "symmetric")
    assert y[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]  # a tap that is not rounded gives the next number
    weight = weight.to(half).float() * 0.375 + torch.finfo(half).eps / 16
    with torch.autocast(device.type, half):
        y = kernels(x * 1024, weight, 1, "symmetric")
    assert torch.equal(y, kernels(x * 1024, weight.to(half), 1, "symmetric"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_has_its_weights_strides_as_ddp_wants(memory_format, device):
    x, weight, dy = operands((2, 8, 5, 6), torch.float32, device)
    weight = weight.contiguous(memory_format=memory_format)
    weight = torch.empty_like(weight, memory_format=memory_format).copy_(weight).requires_grad_()
    for leaf in (x, x.detach().clone(memory_format=torch.channels_last).requires_grad_()):
        (dw,) = torch.autograd.grad(kernels(leaf, weight, 1, "symmetric"), weight, dy)
        assert dw.stride() == weight.stride()


@pytest.mark.parametrize("layout", ["one number", "NCHW", "a view"])
def test_gradients_arrive_in_any_layout(layout, device):
    x, weight, dy = operands((2, 8, 5, 6), torch.float32, device)
    dy = {
        "one number": torch.ones(1, 1, 1, 1, device=device).expand(dy.shape),
        "NCHW": dy.contiguous(),
        "a view": dy.flip(3).transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    got = results(kernels, x, weight, dy, 1, "symmetric")
    want = results(kernels, x, weight, dy.contiguous(memory_format=torch.channels_last), 1, "symmetric")
    assert all(map(torch.equal, got, want))


def test_inputs_may_start_anywhere_in_memory(dtype, device):
    x, weight, dy = operands((2, 16, 5, 6), dtype, device)
    off = [torch.empty(t.numel() + 1, dtype=dtype, device=device)[1:] for t in (x, weight, dy)]
    off = [o.as_strided(t.shape, t.stride()).copy_(t) for o, t in zip(off, (x, weight, dy), strict=True)]
    want = results(kernels, x, weight, dy, 1, "symmetric")
    assert all(map(torch.equal, results(kernels, *off, 1, "symmetric"), want))
