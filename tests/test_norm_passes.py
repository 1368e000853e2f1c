"""The passes of BatchNorm 3 over thin tensors: numbers against fp64, and bytes against their formulas.

The shapes go with the tiles: 2048 elements a program, in 64, 32 or, of as few channels, 16, 8 or 4, of which B0 walks
over two and more.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_traffic import assert_counted, interpreted, nhwc

from bench.parity import assert_parity
from kernels import common, norm_passes, training_tiles

pytestmark = pytest.mark.one_type

CASES = {
    "one pixel": (1, 8, 1, 1),
    "channels that fill no vector": (2, 3, 19, 29),  # the last program's second tile is all outside
    "one channel": (3, 1, 7, 5),
    "three programs of B0, every mask partial": (3, 24, 6, 17),
    "two blocks of 32 channels, of 64 pixels": (2, 33, 10, 7),
    "every mask full": (1, 64, 8, 4),
    "three blocks of channels, three steps a program of B0": (1, 96, 21, 13),
}
cases = pytest.mark.parametrize("shape", CASES.values(), ids=CASES)


@pytest.fixture
def few_processors(monkeypatch):
    """One processor and small tiles, so that a program of B0 has to walk in small images too."""
    monkeypatch.setattr(training_tiles, "THIN_ELEMENTS", 2048)
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(1, 0))


def image(shape, dtype, device, mean=0.0):
    x = (torch.randn(shape, device=device) + mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def rows(vectors):
    """Vectors [R, C] as R images that broadcast."""
    return [vector[None, :, None, None] for vector in vectors]


def summed(x):
    return x.sum((0, 2, 3))


def merged(partials):
    return partials.double().sum(0)


@cases
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_apply(shape, residual, dtype, device, memory):
    p, stats = memory.place(image(shape, dtype, device)), memory.place(torch.randn(4, shape[1], device=device))
    x = memory.place(image(shape, dtype, device)) if residual else None
    y = common.allocate(shape, p)
    norm_passes.apply_launch(p, stats, x, y).run(device)
    _, _, scale, shift = rows(stats)
    truth = p.double() * scale.double() + shift.double() + (0 if x is None else x.double())
    assert_parity("y", y, truth, (p.float() * scale + shift + (0 if x is None else x.float())).to(dtype))


@cases
@pytest.mark.parametrize("mean", [0.0, 8.0], ids=["", "mean of 8 sigma"])
def test_sums(shape, mean, dtype, device, memory, few_processors):
    dy, p = (memory.place(image(shape, dtype, device, mean)) for mean in (0.0, mean))
    stats = memory.place(
        torch.randn(4, shape[1], device=device) + torch.tensor([mean, 0, 0, 0], device=device)[:, None]
    )
    partials = common.allocate((norm_passes.sums_programs(p), 2, shape[1]), p, torch.float32)
    norm_passes.sums_launch(dy, p, stats, partials).run(device)
    sums, mean_p = merged(partials).float(), stats[0][None, :, None, None]
    centred = dy.double() * (p.double() - mean_p.double())
    for name, got, terms, torchs in (
        ("sum dy", sums[0], dy.double(), dy.float()),
        ("sum dy (p - mean)", sums[1], centred, dy.float() * (p.float() - mean_p)),
    ):  # terms of both signs: what they sum to says nothing of their rounding
        assert_parity(name, got, summed(terms), summed(torchs), summed(terms.abs()).max().item())


@cases
def test_projected_grad(shape, dtype, device, memory):
    dy, p = (memory.place(image(shape, dtype, device)) for _ in range(2))
    coefs = memory.place(torch.randn(3, shape[1], device=device))
    dp = common.allocate(shape, p)
    norm_passes.projected_grad_launch(dy, p, coefs, dp).run(device)
    ca, cb, cc = rows(coefs)
    truth = ca.double() * dy.double() + cb.double() * p.double() + cc.double()
    assert_parity("dp", dp, truth, (ca * dy.float() + (cb * p.float() + cc)).to(dtype))


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_together_they_are_a_norm_and_its_gradients(frozen, dtype, device, memory, few_processors):
    shape, C, eps = (3, 24, 6, 17), 24, 1e-3
    p, dy = memory.place(image(shape, dtype, device, 2.0)), memory.place(image(shape, dtype, device))
    gamma, beta = torch.rand(C, device=device) + 0.5, torch.randn(C, device=device)
    running = torch.randn(C, device=device), torch.rand(C, device=device) + 0.5

    def torchs(dtype, precise):
        leaves = [x.to(kind).requires_grad_() for x, kind in ((p, dtype), (gamma, precise), (beta, precise))]
        y = F.batch_norm(leaves[0], *(r.to(precise) for r in running), *leaves[1:], not frozen, 0.0, eps)
        y.backward(dy.to(dtype))
        return y.detach(), *(leaf.grad for leaf in leaves)

    var, mean = torch.var_mean(p.double(), (0, 2, 3), correction=0)
    if frozen:
        mean, var = (r.double() for r in running)
    rstd = (var + eps).rsqrt()
    stats = memory.place(torch.stack([mean, rstd, gamma * rstd, beta - mean * gamma * rstd]).float())
    y, dp = common.allocate(shape, p), common.allocate(shape, p)
    partials = common.allocate((norm_passes.sums_programs(p), 2, C), p, torch.float32)
    norm_passes.apply_launch(p, stats, None, y).run(device)
    norm_passes.sums_launch(dy, p, stats, partials).run(device)
    mean, rstd, scale, _ = stats.double()
    dbeta, centred = merged(partials)
    dgamma, n = rstd * centred, p.numel() // C
    cb = torch.zeros_like(scale) if frozen else -scale * rstd * dgamma / n
    cc = torch.zeros_like(scale) if frozen else -scale * dbeta / n - cb * mean
    norm_passes.projected_grad_launch(dy, p, memory.place(torch.stack([scale, cb, cc]).float()), dp).run(device)
    got, names = (y, dp, dgamma.float(), dbeta.float()), ("y", "dp", "dgamma", "dbeta")
    truth, other = torchs(torch.float64, torch.float64), torchs(dtype, torch.float32)
    for name, *values in zip(names, got, truth, other, strict=True):
        scale = max(summed(dy.abs().double())).item() if name in names[2:] else None
        assert_parity(name, *values, scale)


def test_two_runs_give_the_same_bits(dtype, device, memory, few_processors):
    shape = (3, 24, 6, 17)
    dy, p = (memory.place(image(shape, dtype, device)) for _ in range(2))
    stats, runs = memory.place(torch.randn(4, 24, device=device)), []
    for _ in range(2):
        partials = common.allocate((norm_passes.sums_programs(p), 2, 24), p, torch.float32)
        norm_passes.sums_launch(dy, p, stats, partials).run(device)
        runs.append(partials.clone())
    assert torch.equal(*runs)


def test_no_images_are_no_programs(device, few_processors):
    none = torch.empty((0, 8, 3, 3), device=device).to(memory_format=torch.channels_last)
    stats = torch.zeros(4, 8, device=device)
    assert norm_passes.sums_programs(none) == 0
    norm_passes.apply_launch(none, stats, None, none).run(device)
    norm_passes.sums_launch(none, none, stats, torch.empty(0, 2, 8, device=device)).run(device)


@pytest.mark.parametrize("shape", [(256, 16, 112, 112), (256, 24, 56, 56), (256, 160, 7, 7), (1, 320, 7, 7)], ids=str)
def test_partials_of_b0_are_few_and_programs_enough(shape):
    p = torch.empty(shape, dtype=torch.float16, device="meta", memory_format=torch.channels_last)
    launch = norm_passes.sums_launch(p, p, p, p)
    P, blocks_c = launch.grid
    assert P * 2 * shape[1] * 4 <= 2 * p.nbytes / 16
    assert p[:, 0].numel() > (P - 1) * launch.arguments["STEPS"] * launch.arguments["BLOCK_M"]  # none is empty
    if shape[0] == 256:
        assert P * blocks_c >= 132


@interpreted
@cases
def test_launches_move_the_bytes_of_their_formulas(shape, few_processors):
    p, other, out = (nhwc(*shape) for _ in range(3))
    stats, coefs = torch.zeros(4, shape[1]), torch.zeros(3, shape[1])
    partials = torch.zeros(norm_passes.sums_programs(p), 2, shape[1])
    for residual in (None, other):
        arguments = (p, stats, residual, out)
        assert_counted(norm_passes.apply_launch(*arguments), norm_passes.apply_bytes(*arguments))
    arguments = (other, p, stats, partials)
    assert_counted(norm_passes.sums_launch(*arguments), norm_passes.sums_bytes(*arguments))
    arguments = (other, p, coefs, out)
    assert_counted(norm_passes.projected_grad_launch(*arguments), norm_passes.projected_grad_bytes(*arguments))


def test_the_cases_have_several_programs_in_each_direction_and_every_width_of_tile(few_processors):
    assert {training_tiles.thin_tile(shape[1]).BLOCK_C for shape in CASES.values()} >= {4, 8, 32, 64}
    launches = [norm_passes.sums_launch(nhwc(*shape), nhwc(*shape), None, None) for shape in CASES.values()]
    assert max(launch.grid[0] for launch in launches) >= 3
    assert max(launch.grid[1] for launch in launches) == 3
    assert max(launch.arguments["STEPS"] for launch in launches) == 3
