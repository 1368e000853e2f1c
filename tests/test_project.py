"""Passes P3 and B1, over D, and the scaled weights: numbers against fp64, bytes against their formulas.

The shapes go with the tiles: P3 has 128 or 64 pixels by 16, 32 or 64 channels of P at a time, B1 64 or 32 pixels by 16
or 64 channels of D, and c_out by 32.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_traffic import assert_counted, interpreted, nhwc
from torch import Tensor

from bench.parity import assert_parity
from kernels import common, project, training_tiles, weights
from mnv2.model import layer_shapes

pytestmark = pytest.mark.one_type

# N, H, W, c_mid, c_out
CASES = {
    "one pixel": (1, 1, 1, 64, 20),
    "channels that fill no vector": (1, 8, 8, 33, 5),
    "every mask full": (2, 8, 8, 64, 16),
    "two tiles of pixels, the last not full": (2, 9, 8, 48, 24),
    "two pieces of c_out": (1, 5, 7, 40, 72),
    "blocks of 64 channels": (1, 6, 11, 128, 64),
    "three pieces of c_out": (1, 4, 5, 40, 136),
    "blocks of 64 channels, four pieces of c_out": (1, 5, 7, 128, 200),
    "more of c_out than fit beside 64 channels": (1, 3, 5, 24, 328),
}
SANITIZED = ("one pixel", "channels that fill no vector", "two pieces of c_out")
WALK = (2, 17, 17, 20, 8)  # 5 tiles of P3 and 10 of B1, which few processors share


def network_cases():
    """D and c_out of every distinct block of the network, on images so small that the interpreter can."""
    shapes = {
        (layer.c_mid, layer.c_out): min(layer.height_out, 8)
        for layer in layer_shapes(1.0, 224)
        if layer.kind == "block"
    }
    for (c_mid, c_out), side in shapes.items():
        yield 1, side, side + 1, c_mid, c_out


def cases():
    for name, case in CASES.items():
        yield pytest.param(case, id=name)
    for case in network_cases():
        yield pytest.param(case, id="x".join(map(str, case)), marks=pytest.mark.exhaustive)


@pytest.fixture(autouse=True)
def _processors(monkeypatch):
    """As many everywhere, so that programs are what the cases say."""
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(132, 0))


@pytest.fixture
def sampled(request, case):
    """Skips all cases but those that a sanitizer has time for."""
    if request.config.getoption("--sanitize") and case not in [CASES[name] for name in SANITIZED]:
        pytest.skip("the sanitizer takes other cases")


class Operands(NamedTuple):
    """D, dP, W2 in D's type and BN2's stats."""

    d: Tensor
    dp: Tensor
    w2: Tensor
    stats: Tensor


def image(shape, dtype, mean=0.0):
    return (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def operands(case, dtype, device, memory):
    """Numbers that fill the clamp's range on both sides."""
    N, H, W, c_mid, c_out = case
    stats = torch.randn(4, c_mid)
    stats[2], stats[3] = stats[2] + 2, stats[3] + 1
    all_of = (
        image((N, c_mid, H, W), dtype, 0.5),
        image((N, c_out, H, W), dtype),
        (torch.randn(c_out, c_mid) / c_mid**0.5).to(dtype),
        stats,
    )
    return Operands(*(memory.place(tensor.to(device)) for tensor in all_of))


def column(vector: Tensor) -> Tensor:
    """A vector of channels, to go with images."""
    return vector[:, None, None]


def tolerance(dtype: torch.dtype) -> float:
    """For fp32 sums of numbers rounded to ``dtype``, of which in half precision some go to the other neighbour."""
    return max(1e-5, 0.1 * torch.finfo(dtype).eps)


def assert_near(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    """Hold the largest error of ``got`` to a share of the largest value of ``truth`` (fp64)."""
    assert truth.dtype == torch.float64
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} values are not finite"
    error = (got.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: error {error:.3e}, allowed {tolerance:.1e}"


def assert_moments(partials: Tensor, values: Tensor, lost: float = 0.0) -> None:
    """Hold the merged records ``partials [P, 1 + 2 C]`` to the moments of ``values [N, C, H, W]`` (fp64).

    ``lost`` is what rounding leaves of a variance that is zero, as a share of the largest value's square.
    """
    C = values.shape[1]
    count, means, seconds = partials.double().split([1, C, C], dim=1)
    mean = (count * means).sum(0) / count.sum()
    var = (seconds + count * (means - mean) ** 2).sum(0) / count.sum()
    rows = values.permute(0, 2, 3, 1).flatten(0, 2)
    want, want_var = rows.mean(0), rows.var(0, correction=0)
    assert count.sum() == len(rows), f"count {count.sum()}, expected {len(rows)}"
    off = (mean - want).abs()
    assert (off <= 1e-5 * want_var.sqrt() + 5e-7 * rows.abs().max()).all(), f"mean: error {off}"
    off = (var - want_var).abs()
    assert (off <= 1e-4 * want_var + lost * rows.abs().max() ** 2).all(), f"variance: error {off} of {want_var}"


def run_project(o, **keywords):
    """P and its moments' partials, by the kernel."""
    p = common.allocate(tuple(o.dp.shape), o.d)
    launch = common.launched(project.project_launch, o.d, o.stats, o.w2, p, **keywords)
    return p, launch.arguments["partials_ptr"]


def activation(o):
    """Z2, and B at a sixth, in fp64."""
    z = o.d.double() * column(o.stats[2].double()) + column(o.stats[3].double())
    return z, z.clamp(0, 6) / 6


def check_project(o):
    """Hold P and its moments to fp64; B is rounded, as a factor."""
    p, partials = run_project(o, moments=True)
    b, w2 = activation(o)[1] * 6, o.w2[:, :, None, None]
    other = F.conv2d(b.to(o.d.dtype).float(), w2.float()).to(o.d.dtype)
    assert_parity("P", p, F.conv2d(b, w2.double()), other)
    assert_moments(partials, p.double())


def check_grads(o):
    """Hold the sums of BN2's backward and dW2 to fp64."""
    launch = common.launched(project.project_grads_launch, o.d, o.dp, o.w2, o.stats)
    sums, dw = (launch.arguments[name].double().sum(0) for name in ("sums_ptr", "dw_ptr"))
    z, b = activation(o)
    dz = F.conv2d(o.dp.double(), o.w2.double().t()[:, :, None, None]) * ((z > 0) & (z < 6))
    off = o.d.double() - column(o.stats[0].double())
    assert_near("dbeta2", sums[0], dz.sum((0, 2, 3)), 1e-5)
    assert_near("dgamma2", sums[1], (dz * off).sum((0, 2, 3)), 1e-5)
    rounded = b.float().to(o.d.dtype).double() * 6  # as a factor
    truth = torch.einsum("nehw,nohw->eo", rounded, o.dp.double())
    assert_near("dW2", dw, truth, tolerance(o.d.dtype))


@pytest.mark.parametrize("case", [*cases()])
def test_project(case, sampled, dtype, device, memory):
    check_project(operands(case, dtype, device, memory))


@pytest.mark.parametrize("case", [*cases()])
def test_project_grads(case, sampled, dtype, device, memory):
    check_grads(operands(case, dtype, device, memory))


@pytest.mark.parametrize("check", [check_project, check_grads])
def test_programs_that_go_through_tiles_of_which_the_last_may_be_empty(check, dtype, device, memory, monkeypatch):
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(1, 0))
    monkeypatch.setattr(training_tiles, "WARPS_PER_PROCESSOR", 12)  # three programs of P3 have two tiles each of five
    check(operands(WALK, dtype, device, memory))


@pytest.mark.parametrize("c_out", [72, 104])
def test_the_tiles_of_tensor_memory(c_out, dtype, device, memory, monkeypatch):
    limits = common.Limits(1, 0, tensor_memory=True)
    monkeypatch.setattr(common, "limits", lambda device: limits)
    sizes = {training_tiles.project_tile.default(20, width, 2, limits)[:3] for width in (72, 104)}
    assert sizes == {training_tiles.project_tile.default(20, width, 2, limits)[:3] for width in range(65, 400)}
    check_project(operands((2, 9, 5, 20, c_out), dtype, device, memory))


def test_without_moments_p_is_the_same(dtype, device, memory):
    o = operands(CASES["two pieces of c_out"], dtype, device, memory)
    p, partials = run_project(o, moments=False)
    assert partials is None
    assert torch.equal(p, run_project(o, moments=True)[0])


def test_moments_of_means_far_from_zero(dtype, device, memory):
    """B close to 3: P has a mean of hundreds of its deviations."""
    o = operands(CASES["two tiles of pixels, the last not full"], dtype, device, memory)
    o.stats[2], o.stats[3] = 0.01, 3.0
    o.w2.abs_()
    p, partials = run_project(o, moments=True)
    assert (p.double().mean((0, 2, 3)) > 100 * p.double().std((0, 2, 3))).all()
    assert_moments(partials, p.double())


@pytest.mark.parametrize("row", [2, 3], ids=["scale", "shift"])
def test_statistics_that_are_no_numbers_make_p_none(row, dtype, device, memory, clamps_drop_nan):
    o = operands(CASES["channels that fill no vector"], dtype, device, memory)
    o.stats[row, 3] = float("nan")
    p, partials = run_project(o, moments=True)
    assert p.isnan().all()
    assert partials[:, 1:].isnan().all()


def test_the_cases_have_every_tile():
    c_mids = {c_mid for *_, c_mid, _ in CASES.values()}
    sizes = {(c_mid, c_out) for *_, c_mid, c_out in CASES.values()}
    limits = common.Limits(132, 0)
    wanted = {training_tiles.project_tile.default(20, c_out, 2, limits) for c_out in range(1, 400)}
    assert {training_tiles.project_tile.default(20, c_out, 2, limits) for _, c_out in sizes} == wanted
    rule = training_tiles.project_grad_tile.default
    wanted = {rule(c_mid, c_out, 2, limits) for c_mid in range(1, 400) for c_out in range(1, 400)}
    assert {rule(*size, 2, limits) for size in sizes} == wanted
    assert any(c_mid % 16 for c_mid in c_mids)


@interpreted
@pytest.mark.parametrize("case", [*CASES.values(), WALK], ids=[*CASES, "several tiles a program"])
def test_launches_move_the_bytes_of_their_formulas(case, monkeypatch):
    N, H, W, c_mid, c_out = case
    if case == WALK:
        monkeypatch.setattr(common, "limits", lambda device: common.Limits(1, 0))
    d, p = nhwc(N, c_mid, H, W), nhwc(N, c_out, H, W)
    w2, stats = torch.zeros(c_out, c_mid, dtype=torch.float16), torch.zeros(4, c_mid)
    for moments in (True, False):
        launch = project.project_launch(d, stats, w2, p, moments=moments)
        assert_counted(launch, project.project_bytes(d, stats, w2, p, moments=moments))
    launch = project.project_grads_launch(d, p, w2, stats)
    assert_counted(launch, project.project_grads_bytes(d, p, w2, stats))


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", [(5, 7), (48, 33)], ids=["one program", "two programs"])
@pytest.mark.parametrize("master", [True, False], ids=["of fp32", "of the same type"])
def test_scaled_weights_are_rounded_once(shape, rows, master, dtype, device, memory):
    weight = memory.place(torch.randn(*shape, 1, 1, device=device).to(torch.float32 if master else dtype))
    factor = memory.place(torch.randn(shape[0 if rows else 1], device=device))
    out = common.allocate(shape, weight, dtype)
    common.launched(weights.scaled_launch, weight, factor, out, rows=rows)
    truth = weight.view(shape).float() * (factor[:, None] if rows else factor)
    assert torch.equal(out, truth.to(dtype))


@interpreted
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_scaling_moves_the_bytes_of_its_formula(rows):
    weight, out = torch.zeros(48, 33, 1, 1), torch.zeros(48, 33, dtype=torch.float16)
    factor = torch.zeros(48 if rows else 33)
    formula = weights.scaled_bytes(weight, factor, out, rows=rows)
    assert_counted(weights.scaled_launch(weight, factor, out, rows=rows), formula)
