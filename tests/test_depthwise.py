"""The depthwise convolution: every number against fp64, and everything that can be asked of it wrongly.

The shapes go with the tiles: strips of 4 columns (of 2 where the last would idle), 8 strips by 64 channels, 16 by 32 or
32 by 16 a program, rows from 9 on in chunks.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_parity
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import DepthwiseConv2d, common, depthwise, depthwise_conv2d, depthwise_passes, partials, reference
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


def check(shape, stride, padding, dtype, device, memory):
    """Hold output and gradients of fresh inputs to fp64."""
    x, weight, dy = map(memory.place, operands(shape, dtype, device, stride))
    got = results(kernels, x, weight, dy, stride, padding)
    truth = results(torchs, x.double(), weight.double(), dy.double(), stride, padding)
    torch_same_type = results(torchs, x, weight, dy, stride, padding)
    for name, *values in zip(("y", "dx", "dw"), got, truth, torch_same_type, strict=True):
        assert_parity(name, *values)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    memory.check()


@pytest.mark.parametrize(("shape", "stride", "padding"), list(cases()))
def test_output_and_gradients(shape, stride, padding, dtype, device, memory):
    check(shape, stride, padding, dtype, device, memory)


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
    got = partials.sum_partials(values, torch.float32)
    assert_parity("sum", got, values.double().sum(0).t(), values.sum(0).t())


def test_no_programs_sum_to_zero(device, memory):
    assert torch.equal(
        partials.sum_partials(torch.empty(0, 9, 4, device=device), torch.float16).cpu(), torch.zeros(4, 9).half()
    )


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
def test_offsets_beyond_2_to_the_31(shape, sizes, request):
    if request.config.getoption("--sanitize") or torch.cuda.is_available():
        pytest.skip("needs memory that is only reserved: the interpreter's")
    N, _, _, W = shape
    x, y, dx = (torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last) for _ in range(3))
    rows = sizes["ROWS"]
    near = operands((N, 32, rows + 1, W), torch.float16, "cpu")[0]
    x[:, :32, : rows + 1] = near
    weight = torch.randn(32, 1, 3, 3).half()
    assert x.numel() > 2**31
    forward = depthwise_passes.depthwise_fwd_launch(x, weight, y, 1, "symmetric")
    backward = depthwise_passes.depthwise_bwd_launch(x, None, weight, dx, 1, "symmetric")
    for launch in (forward, backward):
        launch.kernel[(1, 1)](**{**launch.arguments, **sizes})
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


# Bad input.


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
    x, weight, _ = operands((1, 8, 4, 4), torch.float32, device)
    with Calls() as calls:
        depthwise_conv2d(x, weight)
    assert calls.names == ([] if device.type == "cpu" else ["depthwise_fwd"])


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    problem = common.unsupported_device(torch.device("cuda:0"))
    assert problem == (match and match.removeprefix("x: "))
