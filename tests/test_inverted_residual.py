"""The training block through the kernels: outputs, gradients and running statistics against its torch twin in fp64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from numerics import Calls, GuardedMemory
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bench.parity import assert_alike, assert_parity
from kernels import BatchNorm, common, inverted_residual, reference
from kernels import inverted_residual_passes as passes
from kernels.moments import KAPPA_MAX
from mnv2.model import layer_shapes

PARTS = ("x", "w1", "wd", "w2", "gamma1", "beta1", "gamma2", "beta2", "gamma3", "beta3")


@dataclass
class Case:
    """A block on random numbers; ``why`` it is among the cases."""

    why: str
    N: int
    H: int
    W: int
    c_in: int
    ratio: int
    c_out: int
    stride: int = 1
    residual: bool = False
    padding: str = "symmetric"
    frozen: tuple[bool, bool, bool] = (False, False, False)
    save: str = "D"
    norm: dict[str, Any] = field(default_factory=dict)
    mean: float = 0.5

    def __str__(self) -> str:
        return self.why


CASES = [
    Case("residual, odd sizes", 2, 9, 7, 8, 6, 8, residual=True),
    Case("stride 2, odd sizes", 2, 9, 7, 8, 6, 16, stride=2),
    Case("stride 2, same padding, even and odd", 2, 8, 7, 8, 6, 16, stride=2, padding="same"),
    Case("no expansion, residual", 2, 9, 7, 8, 1, 8, residual=True),
    Case("no expansion, stride 2, same padding", 2, 8, 6, 16, 1, 8, stride=2, padding="same"),
    Case("dZ1 is stored, residual", 2, 6, 5, 40, 2, 40, residual=True),
    Case("channels that fill no vector", 2, 5, 6, 7, 3, 5),
    Case("D and P made again", 2, 7, 6, 8, 6, 8, residual=True, save="X"),
    Case("all norms frozen", 2, 6, 7, 8, 6, 8, residual=True, frozen=(True, True, True)),
    Case("frozen, no residual, D and P made again", 2, 6, 7, 8, 6, 12, frozen=(True, True, True), save="X"),
    Case("first norm frozen", 2, 6, 5, 40, 2, 40, residual=True, frozen=(True, False, False)),
    Case("last norms frozen", 2, 6, 7, 8, 6, 12, frozen=(False, True, True)),
    Case("cumulative average", 3, 6, 5, 8, 2, 8, norm={"momentum": None}),
    Case("no affine, large epsilon", 2, 6, 5, 8, 2, 8, norm={"affine": False, "eps": 0.1}),
    Case("no running statistics", 2, 6, 5, 8, 2, 8, norm={"track_running_stats": False}),
    Case("images of one pixel", 64, 1, 1, 8, 2, 8, residual=True, mean=0.0),
    Case("batch of one, a mean of 8 sigma", 1, 9, 8, 16, 6, 16, residual=True, mean=8.0),
]


class Module(nn.Module):
    """The block of a case as torch's modules."""

    def __init__(self, case: Case, dtype: torch.dtype):
        super().__init__()
        c_mid = case.c_in * case.ratio
        self.case = case
        expand = [nn.Conv2d(case.c_in, c_mid, 1, bias=False), nn.BatchNorm2d(c_mid, **case.norm)]
        self.expand = nn.Sequential(*expand) if case.ratio > 1 else nn.Sequential()
        self.depthwise = nn.Conv2d(c_mid, c_mid, 3, groups=c_mid, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(c_mid, **case.norm)
        self.project = nn.Conv2d(c_mid, case.c_out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(case.c_out, **case.norm)
        norms = [*self.expand[1:], self.depthwise_norm, self.project_norm]
        for norm, frozen in zip(norms, case.frozen[-len(norms) :], strict=True):
            if norm.affine:
                nn.init.normal_(norm.weight, 1.0, 0.3)
                nn.init.normal_(norm.bias, 0.5, 0.5)
            if norm.track_running_stats:
                nn.init.normal_(norm.running_mean, 0.0, 0.2)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)
            norm.train(not frozen)
        for conv in (*self.expand[:1], self.depthwise, self.project):
            conv.weight.data.normal_(0.0, (2 / conv.weight[0].numel()) ** 0.5)
            conv.weight.data = conv.weight.data.to(dtype)

    def norm(self, module: nn.BatchNorm2d) -> BatchNorm:
        tensors = (module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked)
        batch = module.training or module.running_mean is None
        return BatchNorm(*tensors, batch, module.momentum, module.eps)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        expand = [self.expand[0].weight, self.norm(self.expand[1])] if self.expand else [None, None]
        operation = inverted_residual if how else reference.inverted_residual
        return operation(
            x,
            *expand,
            self.depthwise.weight,
            self.norm(self.depthwise_norm),
            self.project.weight,
            self.norm(self.project_norm),
            stride=self.case.stride,
            residual=self.case.residual,
            padding=self.case.padding,
            **how,
        )


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X, a third of whose channels have the case's mean, and dY."""
    mean = torch.where(torch.arange(case.c_in) % 3 == 0, case.mean, 0.0)[:, None, None]
    x = torch.randn(case.N, case.c_in, case.H, case.W) + mean
    out = (case.N, case.c_out, common.cdiv(case.H, case.stride), common.cdiv(case.W, case.stride))
    return x.to(dtype), torch.randn(out).to(dtype)


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def results(module: Module, x: Tensor, dy: Tensor, **how: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients, and buffers afterwards."""
    x = nhwc(x.detach()).requires_grad_()
    y = module(x, **how)
    y.backward(nhwc(dy))
    grads = {"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}
    return y.detach(), grads, dict(module.named_buffers())


def assert_block(case: Case, dtype: torch.dtype, device: torch.device, memory: Any) -> None:
    """The parity rule for all that a block gives.

    Through three norms rounding differs from order to order: torch's own error is the largest of some orders of the
    batch. In fp32 twice as much is allowed, as sums over X of which a mean is taken afterwards lose some more bits.
    """
    times = 4 if dtype == torch.float32 else 2
    module = Module(case, dtype).to(device)
    x, dy = (memory.place(nhwc(tensor.to(device))) for tensor in inputs(case, dtype))
    got = results(deepcopy(module), x, dy, backend="triton", save=case.save)
    exact = results(deepcopy(module).double(), x.double(), dy.double())
    orders = [torch.arange(case.N), torch.arange(case.N).flip(0), torch.randperm(case.N), torch.arange(case.N).roll(1)]
    torchs = []
    for order in orders:
        y, grads, buffers = results(deepcopy(module), x[order], dy[order])
        back = order.argsort()
        torchs.append((y[back], {**grads, "x": grads["x"][back]}, buffers))

    def check(name: str, pick: Callable[[Any], Tensor], scale: float) -> None:
        truth = pick(exact)
        worst = max((pick(one) for one in torchs), key=lambda one: (one.double() - truth).norm().item())
        if dtype != torch.float32 and name.startswith("gradient"):
            assert_alike(name, pick(got), truth, worst, scale)
        else:
            assert_parity(name, pick(got), truth, worst, scale, times)

    assert got[0].is_contiguous(memory_format=torch.channels_last)
    check("y", lambda result: result[0], exact[0].abs().max().item())
    largest = max(grad.abs().max().item() for grad in exact[1].values())
    for name in exact[1]:
        check(f"gradient of {name}", lambda result, name=name: result[1][name], largest)
    for name, truth in exact[2].items():
        if truth.is_floating_point():  # of numbers of that type
            rounding = truth.abs().max().item() * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            check(name, lambda result, name=name: result[2][name], rounding)
        else:
            assert got[2][name] == truth


@pytest.fixture
def guarded(monkeypatch):
    """As ``memory``, which would have the sanitizer run these too: it has the passes one by one."""
    memory = GuardedMemory(monkeypatch.setattr)
    yield memory
    memory.check()


@pytest.mark.one_type
@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_block_is_its_twin(case, dtype, device, guarded):
    assert_block(case, dtype, device, guarded)


@pytest.mark.parametrize("case", [case for case in CASES if case not in CASES[::6]], ids=str)
def test_block_is_its_twin_in_fp32(case, device, guarded):
    assert_block(case, torch.float32, device, guarded)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if case not in CASES[::6]], ids=str)
def test_other_types(case, dtype, device, guarded):
    assert_block(case, dtype, device, guarded)


def network_cases() -> list[Case]:
    """The distinct blocks of alpha 1.0 on small images."""
    shapes = {(b.c_in, b.c_mid // b.c_in, b.c_out, b.stride, b.residual) for b in layer_shapes(1.0, 224)[1:-2]}
    return [
        Case(f"{c_in}-{c_in * t}-{c_out}/{stride}{'+' * residual}", 2, 6, 5, c_in, t, c_out, stride, residual)
        for c_in, t, c_out, stride, residual in sorted(shapes)
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", network_cases(), ids=str)
def test_every_block_of_the_network(case, dtype, device, guarded):
    assert_block(case, dtype, device, guarded)


class RecordedForward(TorchDispatchMode):
    """Inside, ``arguments`` are those of the last block's forward."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mnv2.inverted_residual_fwd.default:
            self.arguments = args
        return func(*args, **(kwargs or {}))


def block(**changes: Any) -> tuple[Module, Tensor, Tensor]:
    """A small block with inputs in fp32."""
    case = Case("", **{**{"N": 2, "H": 5, "W": 6, "c_in": 8, "ratio": 3, "c_out": 8, "residual": True}, **changes})
    return Module(case, torch.float32), *map(nhwc, inputs(case, torch.float32))


def test_gradcheck_of_the_twin():
    module, x, _ = block(N=2, H=3, W=2, c_in=2, ratio=2, c_out=2)
    module = module.double()
    weights = list(module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(nhwc(x)), (x.double().requires_grad_(), *weights), atol=1e-6)


def test_statistics_of_collinear_channels_take_the_direct_pass(device):
    # Channels of X that are equal but for a little, and weights of opposite sign: of their Gram matrix nothing is left.
    case = Case("", N=2, H=9, W=8, c_in=8, ratio=2, c_out=8, mean=3.0)
    module = Module(case, torch.float32).to(device)
    x, dy = (nhwc(tensor.to(device)) for tensor in inputs(case, torch.float32))
    x[:, 1] = x[:, 0] + 1e-3 * torch.randn_like(x[:, 0])
    with torch.no_grad():
        weight = module.expand[0].weight
        weight[:4] = 0.0
        weight[:4, 0], weight[:4, 1] = 1.0, -1.0
        weight[5] = 0.0  # a dead channel
    covariance = torch.cov(x.cpu().double().permute(1, 0, 2, 3).flatten(1))
    w = weight.cpu().double().flatten(1)
    kappa = (w.abs() @ covariance.abs() * w.abs()).sum(1) / (w @ covariance * w).sum(1)
    assert (kappa[:4] > KAPPA_MAX).all()
    _, grads, buffers = results(deepcopy(module), x, dy, backend="triton")
    _, exact_grads, exact = results(deepcopy(module).cpu().double(), x.cpu().double(), dy.cpu().double())
    torch.testing.assert_close(
        buffers["expand.1.running_var"].cpu().double(), exact["expand.1.running_var"], rtol=1e-5, atol=0
    )
    for name in ("expand.1.weight", "expand.1.bias", "x"):
        torch.testing.assert_close(grads[name].cpu().double(), exact_grads[name], rtol=1e-2, atol=1e-4)


@pytest.fixture
def launches(monkeypatch):
    """What is launched in a test, in order."""
    made: list[common.Launch] = []
    run = common.Launch.run
    monkeypatch.setattr(common.Launch, "run", lambda launch, device: (made.append(launch), run(launch, device)))
    return made


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize(
    ("widths", "blocks"),
    [({"c_in": 8, "ratio": 6, "c_out": 8}, 3), ({"c_in": 40, "ratio": 2, "c_out": 40}, 1)],
    ids=["T of three blocks of channels", "dZ1 is stored"],
)
def test_two_runs_give_the_same_bits(widths, blocks, device, launches):
    module, x, dy = block(**widths)
    first, second = (results(deepcopy(module).to(device), x.to(device), dy.to(device), backend="triton") for _ in "ab")
    assert {launch.arguments["BLOCKS"] for launch in launches if "BLOCKS" in launch.arguments} == {blocks}
    assert torch.equal(first[0], second[0])
    assert_same_bits(first[1], second[1])
    assert_same_bits(first[2], second[2])


def test_what_is_kept(device):
    module, x, _ = block(c_out=12, residual=False)
    kept: dict[str, list[int]] = {}
    for save in ("D", "X"):
        sizes = kept.setdefault(save, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            module.to(device)(nhwc(x.to(device)).requires_grad_(), backend="triton", save=save)
    D, P = 24 * 60, 12 * 60
    assert set(kept["D"]) - set(kept["X"]) == {D, P}
    assert x.numel() in kept["X"]


@pytest.mark.parametrize("frozen", [False, True], ids=["statistics of the batch", "frozen"])
def test_what_is_made_again_has_the_same_bits(frozen, dtype, device):
    module, x, dy = block(frozen=(frozen,) * 3)
    module, x, dy = module.to(device, dtype), x.to(device, dtype), dy.to(device, dtype)
    kept, made = (results(deepcopy(module), x, dy, backend="triton", save=save) for save in ("D", "X"))
    assert_same_bits(made[1], kept[1])


def test_weights_are_rounded_to_tf32_where_products_are(monkeypatch):
    weight = torch.randn(24, 8, 1, 1)
    assert torch.equal(passes.rounded(weight, weight), weight[..., 0, 0])
    monkeypatch.setattr(common, "multiplies_tf32", lambda x: True)
    found, exact = passes.rounded(weight, weight), weight[..., 0, 0]
    assert (found.view(torch.int32) & 0x1FFF == 0).all()
    step = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 11)  # between two numbers of ten bits
    assert ((found - exact).abs() <= step / 2).all()


@pytest.mark.parametrize("needed", ["x", "project_norm.bias", "expand.1.weight"])
def test_only_what_is_asked_for(needed, device):
    module, x, dy = block()
    module, x, dy = module.to(device), x.to(device), dy.to(device)
    full = results(deepcopy(module), x, dy, backend="triton")[1][needed]
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == needed)
    x = x.clone().requires_grad_(needed == "x")
    module(x, backend="triton").backward(dy)
    tensors = {"x": x, **dict(module.named_parameters())}
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [needed]
    assert torch.equal(tensors[needed].grad, full)


def test_autocast_keeps_gradients_in_fp32(device):
    module, x, dy = block()
    module, x = module.to(device), x.to(device).requires_grad_()
    with torch.autocast(device.type, torch.float16):
        y = module(x, backend="triton")
        twin = module(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, twin.half(), rtol=2e-2, atol=2e-2)
    y.backward(dy.to(device).half())
    assert {tensor.grad.dtype for tensor in (x, *module.parameters())} == {torch.float32}


def test_masters_are_rounded_before_their_statistics_are_taken(device):
    module, x, dy = block()
    module, x, dy = module.to(device), x.to(device).half(), dy.to(device).half()
    rounded = deepcopy(module)
    for conv in (rounded.expand[0], rounded.project):
        conv.half().float()
    with torch.autocast(device.type, torch.float16):
        (y, *got), (expected, *want) = (results(one, x, dy, backend="triton") for one in (module, rounded))
    assert torch.equal(y, expected)
    for found, other in zip(got, want, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in found.items())


def test_infinities_reach_the_scaler(device):
    module, x, dy = block()
    module, x = module.to(device), x.to(device)
    dy[0, 0, 0, 0] = float("inf")
    module(x, backend="triton").backward(dy.to(device))
    assert any(not parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("ratio", [3, 1], ids=["expansion", "no expansion"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_number_in_the_input_is_not_hidden(number, ratio, device, clamps_drop_nan):
    module, x, _ = block(ratio=ratio, c_out=12, residual=False)  # X, added to Y, would show it
    x[1, 3, 2, 2] = number
    assert module.to(device)(x.to(device), backend="triton").isnan().all()


def test_second_derivatives_are_refused(device):
    module, x, _ = block()
    x = x.to(device).requires_grad_()
    (grad,) = torch.autograd.grad(module.to(device)(x, backend="triton").square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="can't be differentiated again; take backend='torch'"):
        grad.sum().backward()


def test_checkpointed(device):
    module, x, dy = block()
    module, x, dy = module.to(device), x.to(device), dy.to(device)
    _, grads, _ = results(deepcopy(module), x, dy, backend="triton")
    x = x.requires_grad_()
    checkpoint(module, x, use_reentrant=False, backend="triton").backward(dy)
    assert_same_bits({"x": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}, grads)


def test_compiles_whole(device):
    module, x, dy = block()
    module, x, dy = module.to(device), x.to(device), dy.to(device)
    y, grads, buffers = results(deepcopy(module), x, dy, backend="triton")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, got_grads, got_buffers = results(compiled, x, dy, backend="triton")
    torch.testing.assert_close(got, y)
    for name, grad in grads.items():
        torch.testing.assert_close(got_grads[name if name == "x" else f"_orig_mod.{name}"], grad)
    for name, buffer in buffers.items():
        torch.testing.assert_close(got_buffers[f"_orig_mod.{name}"], buffer)


def test_the_forward_as_torch_sees_it(device):
    module, x, _ = block(frozen=(True, False, False))
    with RecordedForward() as recorded:
        module.to(device).requires_grad_(False)(x.to(device), backend="triton")
    torch.library.opcheck(torch.ops.mnv2.inverted_residual_fwd, recorded.arguments)


def test_exports(device):
    module, x, _ = block(frozen=(False, True, False))
    module, x = module.to(device), x.to(device)
    keywords = {"backend": "triton"}
    program = torch.export.export(deepcopy(module), (x,), keywords).run_decompositions().module()
    with torch.no_grad():
        torch.testing.assert_close(program(x, **keywords), module(x, **keywords))
    for name, buffer in program.named_buffers():
        torch.testing.assert_close(buffer, module.get_buffer(name))


def test_only_statistics_that_change_are_marked_as_changed(device):
    module, x, _ = block(frozen=(True, False, True))
    module, x = module.to(device), x.to(device)
    before = {name: buffer._version for name, buffer in module.named_buffers()}
    module(x, backend="triton")
    changed = {name for name, buffer in module.named_buffers() if buffer._version != before[name]}
    assert changed == {f"depthwise_norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("backends", ["torch triton", "triton torch"])
def test_both_paths_over_the_same_frozen_norms_in_one_graph(backends, device):
    module, x, dy = block(frozen=(True, True, True))
    module, x, dy = module.to(device), x.to(device), dy.to(device)
    _, grads, _ = results(deepcopy(module), x, dy, backend="torch")
    x = x.requires_grad_()
    sum(module(x, backend=backend) for backend in backends.split()).backward(dy)
    torch.testing.assert_close(x.grad, 2 * grads["x"], rtol=1e-4, atol=1e-4)


def test_evaluation_takes_no_statistics(device, launches):
    module, x, _ = block()
    module = module.to(device).eval()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad(), Calls() as calls:
        y = module(x.to(device), backend="triton")
    assert calls.names == ["inverted_residual_fwd"]
    assert_same_bits(dict(module.named_buffers()), before)
    assert [launch.kernel.fn.__name__ for launch in launches] == [
        "_frozen_kernel",
        "_expand_depthwise_kernel",
        "_frozen_kernel",
        "_project_kernel",
        "_frozen_kernel",
        "_apply_kernel",
    ]
    assert all(launch.arguments.get("partials_ptr") is None for launch in launches)  # nor moments of D and P
    torch.testing.assert_close(y, module(x.to(device)), rtol=1e-4, atol=1e-5)


def test_auto_takes_torch_on_a_cpu():
    module, x, _ = block()
    with Calls() as calls:
        y = module(x, backend="auto")
    assert calls.names == []
    torch.testing.assert_close(y, module(x))


def test_norms_of_other_channels_are_refused():
    module, x, _ = block()
    module.expand[1] = nn.BatchNorm2d(3)
    with pytest.raises(
        ValueError, match=r"expand_norm: expected weight as 24 contiguous .* got torch.float32 of shape"
    ):
        module(x, backend="triton")
    module, x, _ = block()
    module.project_norm.running_var = torch.ones(16)[::2]
    with pytest.raises(ValueError, match="project_norm: expected running_var as 8 contiguous floating-point numbers"):
        module(x, backend="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"save": "P"}, ValueError, "save: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"stride": 3}, ValueError, "stride: expected 1 or 2, got 3"),
        ({"stride": 1.0}, ValueError, "stride: expected 1 or 2, got 1.0"),
        ({"stride": True}, ValueError, "stride: expected 1 or 2, got True"),
        ({"stride": 2}, ValueError, "residual: expected stride 1"),
        ({"residual": "no"}, TypeError, "residual: expected True or False, got 'no'"),
        ({"padding": "valid"}, ValueError, "padding: expected one of"),
        ({"x": torch.randn(2, 8, 5, 6)}, ValueError, "x: expected channels_last memory"),
        ({"x": nhwc(torch.randn(2, 9, 5, 6))}, ValueError, r"expand_weight: expected \[24, 9, 1, 1\]"),
        ({"x": nhwc(torch.randn(2, 8, 5, 6)).half()}, TypeError, "depthwise_weight: expected x's type torch.float16"),
        ({"expand_norm": None}, ValueError, "expand_weight, expand_norm: expected both or neither"),
        ({"expand_weight": torch.randn(24)}, ValueError, r"expand_weight: expected 4 dimensions .* shape \(24,\)"),
        ({"depthwise_weight": None}, TypeError, "depthwise_weight: expected a tensor, got NoneType"),
        ({"depthwise_weight": torch.randn(24, 9)}, ValueError, r"depthwise_weight: expected 4 .* shape \(24, 9\)"),
        ({"depthwise_weight": torch.randn(24, 1, 2, 2)}, ValueError, r"depthwise_weight: expected \[24, 1, 3, 3\]"),
        ({"project_weight": torch.randn(8, 25, 1, 1)}, ValueError, r"project_weight: expected \[8, 24, 1, 1\]"),
        ({"project_weight": torch.tensor(1.0)}, ValueError, r"project_weight: expected 4 dimensions .* shape \(\)"),
        ({"project_weight": torch.randn(0, 24, 1, 1)}, ValueError, "project_weight: expected .* of at least 1"),
        ({"x": nhwc(torch.randn(1, 8, 1, 1))}, ValueError, "expand_norm: expected more than one number a channel"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, error, message):
    assert_refused(change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (None, TypeError, "expected a kernels.BatchNorm .*, got NoneType"),
        (nn.BatchNorm2d(24), TypeError, "expected a kernels.BatchNorm .*, got BatchNorm2d"),
        ({"weight": 1.0}, TypeError, "expected weight as a tensor or None, got float"),
        ({"bias": torch.zeros(24, device="meta")}, ValueError, "expected bias on x's device cpu, got meta"),
        ({"running_var": None}, ValueError, "expected both running_mean and running_var or neither"),
        ({"running_var": None, "batch_stats": False}, ValueError, "expected running_var where the batch's"),
        ({"running_mean": torch.zeros(24).requires_grad_()}, ValueError, "expected running_mean without a gradient"),
        ({"num_batches_tracked": 1}, TypeError, "expected num_batches_tracked as a tensor or None, got int"),
        ({"num_batches_tracked": torch.tensor(1.0)}, ValueError, "expected num_batches_tracked as one number of"),
        ({"num_batches_tracked": torch.zeros(2).long()}, ValueError, r"got torch.int64 of shape \(2,\)"),
        ({"num_batches_tracked": torch.tensor(1, device="meta")}, ValueError, "x's device cpu, got meta"),
        ({"batch_stats": 1}, TypeError, "expected batch_stats as True or False, got 1"),
        ({"momentum": "a"}, TypeError, "expected momentum as a number or None, got 'a'"),
        ({"momentum": float("nan")}, ValueError, "expected momentum from 0 to 1, got nan"),
        ({"eps": None}, TypeError, "expected eps as a number, got None"),
        ({"eps": -1}, ValueError, "expected a positive eps, got -1"),
        ({"group": None}, TypeError, "expected group as a name, got None"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_norms_are_named(change, error, message):
    norm = block()[0].norm(nn.BatchNorm2d(24))
    norm = norm._replace(**change) if isinstance(change, dict) else change
    assert_refused({"depthwise_norm": norm}, error, f"depthwise_norm: .*{message}")


def assert_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Both backends refuse a block whose arguments are changed so, before anything is counted or updated."""
    module, x, _ = block()
    arguments = {
        "x": x,
        "expand_weight": module.expand[0].weight,
        "expand_norm": module.norm(module.expand[1]),
        "depthwise_weight": module.depthwise.weight,
        "depthwise_norm": module.norm(module.depthwise_norm),
        "project_weight": module.project.weight,
        "project_norm": module.norm(module.project_norm),
        "stride": 1,
        "residual": True,
    }
    for backend in ("torch", "triton"):
        with pytest.raises(error, match=f"^{message}"):
            inverted_residual(**{"backend": backend, **arguments, **change})
    assert not any(norm.num_batches_tracked for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))


def test_what_the_kernels_cant_run_is_torchs(device):
    module, x, _ = block()
    module, x = module.to(device).double(), x.to(device).double()
    with pytest.raises(ValueError, match="x: expected float16, bfloat16 or float32, got torch.float64"):
        module(x, backend="triton")
    with Calls() as calls:
        module(x, backend="auto")
    assert calls.names == []


@pytest.mark.parametrize("frozen", [True, False])
def test_an_empty_batch(frozen, device):
    module, x, _ = block(frozen=(frozen,) * 3)
    module, x = module.to(device), x[:0].to(device).requires_grad_()
    before = [buffer.clone() for buffer in module.buffers() if buffer.is_floating_point()]
    y = module(x, backend="triton")
    assert y.shape == (0, 8, 5, 6)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in module.parameters())
    after = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    assert all(map(torch.equal, before, after))


def test_saved_tensors_may_come_back_in_another_layout(device):
    module, x, dy = block()
    module, x, dy = module.to(device), x.to(device), dy.to(device)
    _, grads, _ = results(deepcopy(module), x, dy, backend="triton")
    x = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):  # as save_on_cpu
        y = module(x, backend="triton")
    y.backward(dy)
    assert torch.equal(x.grad, grads["x"])
