"""Gradients of the expansion and of BatchNorm 1 from dZ1: numbers against autograd in fp64, bytes against formulas.

The shapes go with the tiles: S in 128 by 64, 32 or 16 channels (64 by these in fp32), dX in 128 or 64 pixels by 64, 32
or 16 channels, c_mid by 32 or 16; the gradient of W1 in 4 channels of c_mid, M in 16 columns.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_traffic import assert_counted, interpreted, nhwc
from torch import Tensor

from bench.parity import assert_parity
from kernels import common, expand_finalisers, expand_grads

pytestmark = pytest.mark.one_type

EPS = 1e-3
# N, c_in, c_mid, H, W
CASES = {
    "channels that fill no vector": (2, 3, 10, 9, 7),
    "few pixels": (3, 8, 5, 2, 3),
    "two blocks of pixels": (3, 16, 96, 8, 7),
    "three programs of S, two blocks of c_mid": (2, 24, 130, 17, 17),
    "every mask partial": (2, 40, 70, 9, 11),
    "every mask full in fp32": (1, 64, 64, 8, 16),
    "two blocks of c_in": (1, 96, 37, 9, 9),
}
cases = pytest.mark.parametrize("shape", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _few_processors(monkeypatch):
    """Five processors, so that a program of S has to walk in small images too."""
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(5, 0))


class Operands(NamedTuple):
    """What is given: X, dZ1 and dY, W1 in their type, gamma and beta, running statistics; the type of W1's gradient."""

    x: Tensor
    dz: Tensor
    dy: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    running: tuple[Tensor, Tensor]
    kept: torch.dtype


class Gradients(NamedTuple):
    """What is asked for, and T."""

    dx: Tensor
    dweight: Tensor
    dgamma: Tensor
    dbeta: Tensor
    t: Tensor


def operands(shape, dtype, device, memory, mean=0.0, kept=torch.float32):
    N, c_in, c_mid, H, W = shape

    def image(C, mean=0.0):
        x = (torch.randn(N, C, H, W, device=device) + mean).to(dtype)
        return memory.place(x.contiguous(memory_format=torch.channels_last))

    weight = torch.randn(c_mid, c_in, device=device) * (2 / c_in) ** 0.5
    vectors = [torch.randn(c_mid, device=device) for _ in range(2)] + [torch.rand(c_mid, device=device) + 0.5] * 2
    images = image(c_in, mean), image(c_mid), image(c_in)
    return Operands(*images, memory.place(weight.to(dtype)), *vectors[:2], vectors[2:], kept)


def by_autograd(o: Operands, frozen: bool, residual: bool, dtype: torch.dtype) -> Gradients:
    """By torch in ``dtype``, of a convolution and a norm."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    x = o.x.to(dtype).requires_grad_()
    weight = o.weight.to(precise).requires_grad_()
    gamma, beta = (leaf.to(precise).requires_grad_() for leaf in (o.gamma, o.beta))
    e = F.conv2d(x, weight.to(dtype)[:, :, None, None])
    z = F.batch_norm(e, *(r.to(precise) for r in o.running), gamma, beta, not frozen, 0.0, EPS)
    z.backward(o.dz.to(dtype), inputs=[x, weight, gamma, beta])
    var = o.running[1].to(precise) if frozen else e.detach().to(precise).var((0, 2, 3), correction=0)
    scaled = weight.detach() * (gamma.detach() * (var + EPS).rsqrt())[:, None]
    t = F.conv2d(o.dz.to(dtype), scaled.to(dtype).t()[:, :, None, None])
    dx = x.grad + o.dy.to(dtype) if residual else x.grad
    return Gradients(dx, weight.grad.to(torch.promote_types(dtype, o.kept)), gamma.grad, beta.grad, t)


def pixels(x: Tensor) -> Tensor:
    """An image as [M, C] in fp64."""
    return x.double().permute(0, 2, 3, 1).flatten(0, 2)


def gram_record(x: Tensor) -> Tensor:
    rows = pixels(x)
    centred = rows - rows.mean(0)
    return torch.cat([rows.new_tensor([len(rows)]), rows.mean(0), (centred.t() @ centred).flatten()])


def stats_of(o: Operands, gram: Tensor, frozen: bool) -> Tensor:
    """BN1's stats [4, c_mid], from the record of X."""
    weight, c_in = o.weight.double(), o.x.shape[1]
    if frozen:
        mean, var = (r.double() for r in o.running)
    else:
        mean = weight @ gram[1 : 1 + c_in]
        var = ((weight @ gram[1 + c_in :].view(c_in, c_in)) * weight).sum(1) / gram[0]
    rstd = (var + EPS).rsqrt()
    scale = o.gamma.double() * rstd
    return torch.stack([mean, rstd, scale, o.beta.double() - mean * scale]).float()


def sums_of(x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """S [c_mid, c_in] and dbeta1 [c_mid] by the kernel, summed."""
    s, beta = partials_of(x, dz)
    expand_grads.expand_sums_launch(x, dz, s, beta).run(x.device)
    return s.double().sum(0).t().contiguous(), beta.double().sum((0, 1))


def partials_of(x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``expand_sums_launch`` leaves S and dbeta1."""
    P = expand_grads.expand_sums_programs(x, dz)
    return tuple(common.allocate((P, rows, dz.shape[1]), x, torch.float32) for rows in (x.shape[1], 1))


def weight_grad(o, stats, gram, local=None, global_sums=None, *, only_sums=False):
    """dW1, the rank's sums, the gradients of BN1, and pull, by the kernel."""
    c_mid = len(o.weight)
    dweight = None if only_sums else common.allocate(tuple(o.weight.shape), o.weight, o.kept)
    pull = None if only_sums else common.allocate((2, c_mid), o.weight, torch.float64)
    sums = common.allocate((2, c_mid), o.weight, torch.float64)
    grads = common.allocate((2, c_mid), o.weight, torch.float32)
    s, dbeta = sums_of(o.x, o.dz)
    tensors = (s, dbeta, stats, o.weight, gram, local, global_sums, dweight, sums, grads, pull)
    expand_finalisers.expand_weight_grad_launch(*tensors).run(o.x.device)
    return dweight, sums, grads, pull


def pull_back(weight, pull, gram, dtype):
    """M as it is stored, its scale, and v, by the kernel."""
    c_in = weight.shape[1]
    matrix = common.allocate((c_in, c_in), weight, dtype)
    scale, vector = (common.allocate((c_in,), weight, torch.float32) for _ in range(2))
    expand_finalisers.pull_back_launch(weight, pull, gram, matrix, scale, vector).run(weight.device)
    return matrix, scale, vector


def input_grad(o, stats, pulled, residual, t=None):
    """Of X, by the kernel, from T or from dZ1."""
    dx = common.allocate(tuple(o.x.shape), o.x)
    source = (t, None, None, None) if t is not None else (None, o.dz, o.weight, stats)
    x = (None, None, None, None) if pulled is None else (o.x, *pulled)
    expand_grads.input_grad_launch(dx, *source, *x, o.dy if residual else None).run(o.x.device)
    return dx


def assert_gradients(got: Gradients, truth: Gradients, other: Gradients) -> None:
    """Gradients of channels are sums of terms of both signs: the largest of them all says how they round."""
    for name in ("dx", "dweight", "dgamma", "dbeta"):
        values = [getattr(gradients, name) for gradients in (got, truth, other)]
        scale = None if name == "dx" else max(g.abs().max().item() for g in (truth.dweight, truth.dgamma, truth.dbeta))
        assert_parity(name, *values, scale)


def gradient_cases():
    """Every shape; a large mean and a frozen norm by few of them, elsewhere exhaustive."""
    few = {"mean of 8 sigma": ("few pixels", "two blocks of c_in"), "frozen": ("channels that fill no vector",)}
    for name, shape in CASES.items():
        yield pytest.param(shape, "", id=name)
        for how, names in few.items():
            marks = [] if name in names else [pytest.mark.exhaustive]
            yield pytest.param(shape, how, id=f"{name}, {how}", marks=marks)


@pytest.mark.parametrize(("shape", "how"), list(gradient_cases()))
def test_gradients(shape, how, dtype, device, memory):
    o = operands(shape, dtype, device, memory, 8.0 if "mean" in how else 0.0)
    check(o, memory, frozen=how == "frozen", residual=shape[1] in (3, 24, 96))


def test_a_gradient_of_weights_of_x_s_type(dtype, device, memory):
    check(operands(CASES["few pixels"], dtype, device, memory, kept=dtype), memory, frozen=False, residual=True)


def check(o, memory, *, frozen, residual):
    """Hold the gradients of one process, dX from T and from dZ1, to autograd."""
    dtype = o.x.dtype
    gram = memory.place(gram_record(o.x))
    stats = memory.place(stats_of(o, gram, frozen))
    dweight, sums, grads, pull = weight_grad(o, stats, None if frozen else gram)
    pulled = None if frozen else pull_back(o.weight, pull, gram, dtype)
    truth, other = (by_autograd(o, frozen, residual, kind) for kind in (torch.float64, dtype))
    assert_gradients(Gradients(input_grad(o, stats, pulled, residual), dweight, *grads, other.t), truth, other)
    stored = memory.place(other.t)  # T is rounded as it is stored
    moved, dx = stored.double() - truth.t, input_grad(o, stats, pulled, residual, stored)
    assert_parity("dx from T", dx, truth.dx + moved, (other.dx + moved).to(dtype))
    assert torch.equal(grads, sums.flip(0).float())
    assert dweight.dtype == o.kept
    assert not frozen or not pull.any()


@cases
@pytest.mark.parametrize("magnitude", [1.0, 1e-7], ids=["", "tiny"])
def test_pull_back(shape, magnitude, dtype, device, memory):
    c_in, c_mid = shape[1:3]
    weight = memory.place(torch.randn(c_mid, c_in, device=device).to(dtype))
    pull = memory.place(torch.randn(2, c_mid, device=device, dtype=torch.float64) * magnitude)
    gram = memory.place(torch.randn(1 + c_in + c_in**2, device=device, dtype=torch.float64) + 8)
    matrix, scale, vector = pull_back(weight, pull, gram, dtype)
    exact = weight.double()
    truth = exact.t() @ (exact * pull[0][:, None])
    other = exact.float().t() @ (exact * pull[0][:, None]).float()
    assert_parity("matrix", matrix, truth / scale, (other / scale).to(dtype))
    largest = matrix.float().abs().amax(0)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ((largest >= 0.5) & (largest <= 1)).all()
    want = exact.t() @ pull[1] - gram[1 : 1 + c_in] @ (matrix.double() * scale.double())
    assert_parity("vector", vector, want, want.float())


def test_pull_back_as_tf32_multiplies_it(device, memory, monkeypatch):
    monkeypatch.setattr(common, "multiplies_tf32", lambda x: True)
    c_mid, c_in = 40, 24
    weight, pull = torch.randn(c_mid, c_in, device=device), torch.randn(2, c_mid, device=device, dtype=torch.float64)
    gram = torch.randn(1 + c_in + c_in**2, device=device, dtype=torch.float64)
    matrix, scale, vector = pull_back(*map(memory.place, (weight, pull, gram)), torch.float32)
    assert (matrix.view(torch.int32) & 0x1FFF == 0).all()
    wide = weight.double()
    used = matrix.double() * scale.double()
    torch.testing.assert_close(used, (wide.t() * pull[0]) @ wide, rtol=2**-9, atol=1e-2)
    torch.testing.assert_close(vector, (pull[1] @ wide - gram[1 : 1 + c_in] @ used).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_pull_back_of_nothing_is_nothing_and_of_infinity_not_finite(dtype, device, memory):
    weight = memory.place(torch.randn(10, 3, device=device).to(dtype))
    gram = memory.place(torch.randn(13, device=device, dtype=torch.float64))
    pull = torch.zeros(2, 10, device=device, dtype=torch.float64)
    matrix, scale, vector = pull_back(weight, memory.place(pull), gram, dtype)
    assert not matrix.any()
    assert not vector.any()
    assert (scale == 1).all()
    pull[0, 4] = float("inf")
    matrix, *_ = pull_back(weight, memory.place(pull), gram, dtype)
    assert not matrix.isfinite().any()


def part(o: Operands, images: slice, memory) -> Operands:
    """A rank's images of a batch."""
    thin = (memory.place(x[images].contiguous(memory_format=torch.channels_last)) for x in (o.x, o.dz, o.dy))
    return Operands(*thin, *o[3:])


@pytest.mark.parametrize("mean", [0.0, 8.0], ids=["", "mean of 8 sigma"])
def test_two_ranks_sum_to_one(mean, dtype, device, memory):
    o = operands((5, 24, 50, 5, 7), dtype, device, memory, mean)
    o.x[3:] = o.x[3:] * 2 + 1
    ranks = [part(o, images, memory) for images in (slice(0, 3), slice(3, 5))]
    gram, local = memory.place(gram_record(o.x)), [memory.place(gram_record(rank.x)) for rank in ranks]
    stats = memory.place(stats_of(o, gram, False))
    sums = [weight_grad(rank, stats, gram, own, only_sums=True)[1] for rank, own in zip(ranks, local, strict=True)]
    total = memory.place(sum(sums))
    each = [weight_grad(rank, stats, gram, own, total) for rank, own in zip(ranks, local, strict=True)]
    assert all(torch.equal(rank[1], own) for rank, own in zip(each, sums, strict=True))
    assert torch.equal(each[0][3], each[1][3])  # pull is of all ranks
    pulled = pull_back(o.weight, each[0][3], gram, dtype)
    dx = torch.cat([input_grad(rank, stats, pulled, True) for rank in ranks])
    got = Gradients(dx, sum(rank[0] for rank in each), *sum(rank[2] for rank in each), dx)
    assert_gradients(got, *(by_autograd(o, False, True, kind) for kind in (torch.float64, dtype)))


def test_one_rank_may_say_that_its_moments_are_all(dtype, device, memory):
    o = operands(CASES["few pixels"], dtype, device, memory)
    gram = memory.place(gram_record(o.x))
    stats = memory.place(stats_of(o, gram, False))
    want = weight_grad(o, stats, gram)
    assert all(map(torch.equal, want, weight_grad(o, stats, gram, gram)))
    for got, exact in zip(weight_grad(o, stats, gram, memory.place(gram), want[1]), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_block_without_expansion_adds_its_residual(dtype, device, memory):
    o = operands((2, 24, 8, 9, 11), dtype, device, memory)
    dx = input_grad(o, None, None, True, o.x)
    assert torch.equal(dx, (o.x.float() + o.dy.float()).to(dtype))


def test_two_runs_give_the_same_bits(dtype, device, memory):
    o = operands(CASES["three programs of S, two blocks of c_mid"], dtype, device, memory)
    assert all(map(torch.equal, sums_of(o.x, o.dz), sums_of(o.x, o.dz)))


@pytest.mark.parametrize(("c_in", "c_mid", "side"), [(64, 384, 14), (160, 960, 7), (224, 1344, 7)])
def test_partials_of_s_are_few_and_programs_enough(c_in, c_mid, side, monkeypatch):
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(132, 0))
    x, dz = (
        torch.empty((256, C, side, side), dtype=torch.float16, device="meta", memory_format=torch.channels_last)
        for C in (c_in, c_mid)
    )
    blocks, P = expand_grads.expand_sums_launch(x, dz, None, None).grid
    assert 132 <= blocks * P <= 264
    assert P * c_in * c_mid * 4 <= (x.nbytes + dz.nbytes) / 8


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        CASES["channels that fill no vector"],
        CASES["two blocks of pixels"],
        (2, 24, 130, 13, 13),  # two programs of S, two blocks of c_mid
        (1, 96, 10, 5, 5),  # several blocks of c_in
        (1, 64, 16, 8, 16),  # no mask but of c_mid
    ],
    ids=str,
)
def test_launches_move_the_bytes_of_their_formulas(shape):
    N, c_in, c_mid, H, W = shape
    x, dx, dy, t = (nhwc(N, c_in, H, W) for _ in range(4))
    dz = nhwc(N, c_mid, H, W)
    arguments = (x, dz, *partials_of(x, dz))
    assert_counted(expand_grads.expand_sums_launch(*arguments), expand_grads.expand_sums_bytes(*arguments))

    c_mid = min(c_mid, 21)  # three programs for the gradient of W1
    dz = nhwc(N, c_mid, H, W)
    stats, dweight, grads = torch.zeros(4, c_mid), torch.zeros(c_mid, c_in), torch.zeros(2, c_mid)
    weight = torch.zeros(c_mid, c_in, dtype=torch.float16)
    sizes = (1 + c_in + c_in**2,), (1 + c_in + c_in**2,), (c_mid, c_in), (c_mid,), (2, c_mid), (2, c_mid), (2, c_mid)
    gram, local, s, dbeta, others, sums, pull = (torch.ones(*size, dtype=torch.float64) for size in sizes)
    for moments, outputs in (
        ((gram, None, None), (dweight, sums, grads, pull)),
        ((gram, gram, None), (dweight, sums, grads, pull)),
        ((gram, local, None), (None, sums, grads, None)),
        ((gram, local, others), (dweight, sums, grads, pull)),
        ((None, None, None), (dweight, sums, grads, pull)),
    ):
        arguments = (s, dbeta, stats, weight, *moments, *outputs)
        launch = expand_finalisers.expand_weight_grad_launch(*arguments)
        assert_counted(launch, expand_finalisers.expand_weight_grad_bytes(*arguments))

    tiny = torch.zeros(c_in, c_in, dtype=torch.float16), torch.ones(c_in), torch.ones(c_in)
    arguments = (weight, pull, gram, *tiny)
    assert_counted(expand_finalisers.pull_back_launch(*arguments), expand_finalisers.pull_back_bytes(*arguments))
    for arguments in (
        (dx, None, dz, weight, stats, x, *tiny, dy),
        (dx, t, None, None, None, x, *tiny, None),
        (dx, None, dz, weight, stats, None, None, None, None, None),
        (dx, t, None, None, None, None, None, None, None, dy),
    ):
        assert_counted(expand_grads.input_grad_launch(*arguments), expand_grads.input_grad_bytes(*arguments))


def test_the_cases_have_several_programs_in_each_direction():
    grids, steps = [], []
    for N, c_in, c_mid, H, W in CASES.values():
        launch = expand_grads.expand_sums_launch(nhwc(N, c_in, H, W), nhwc(N, c_mid, H, W), None, None)
        at = launch.arguments
        grids.append((launch.grid[1], at["blocks_n"], launch.grid[0] // at["blocks_n"]))
        steps.append(launch.trips)
    assert [max(sizes) for sizes in zip(*grids, strict=True)] == [3, 3, 2], grids
    assert max(steps) >= 4
