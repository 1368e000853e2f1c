"""Statistics of a batch and BatchNorm's numbers a channel: every number against fp64.

A program of the Gram pass owns whole tiles of 64 pixels (16 in fp32), 8 C of them at least, and blocks of up to 64
channels. The finalisers walk over 256 records (16 of a wide Gram matrix) of 8 channels at a time.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.count import count
from kernels import common, gram_norm, moments, norm_grads, norms
from kernels.common import BatchNorm
from kernels.moments import KAPPA_MAX

pytestmark = pytest.mark.one_type

interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="bytes are counted in Triton's interpreter")
FP32 = 1e-5  # of the largest of a channel: sums of some hundred numbers in fp32
SAME = {"rtol": 1e-6, "atol": 1e-7}  # what is fp64 but for its last rounding


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    """As many programs wherever the tests run."""
    monkeypatch.setattr(common, "limits", lambda device: common.Limits(132, 232448))


def nhwc(x):
    return x.contiguous(memory_format=torch.channels_last)


def images(shape, dtype, device, mean=0.0):
    """Channels of different scales, ``mean`` standard deviations from zero, and not independent."""
    C = shape[1]
    scale = torch.logspace(-1, 1, C, device=device).view(1, C, 1, 1)
    x = torch.randn(shape, device=device)
    return nhwc(((x + 0.5 * x.roll(1, 1) + mean) * scale).to(dtype))


def weights(c_mid, c_in, dtype, device):
    """W1, in X's type as the block rounds it."""
    return torch.randn(c_mid, c_in, device=device).to(dtype)


def rows_of(x):
    """Pixels in fp64, ``[M, C]``."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double()


def gram_truth(x):
    pixels = rows_of(x)
    mean = pixels.mean(0)
    return mean, (pixels - mean).t() @ (pixels - mean)


def record_of(pixels, gram=False):
    """The record of ``pixels [M, C]`` in fp64."""
    mean = pixels.mean(0)
    centred = pixels - mean
    second = (centred.t() @ centred).flatten() if gram else centred.square().sum(0)
    return torch.cat([torch.tensor([float(len(pixels))], device=pixels.device), mean, second])


def norm_of(C, device, *, momentum=0.1, affine=True, track=True, dtype=torch.float32, batch_stats=True):
    module = nn.BatchNorm2d(C, momentum=momentum, affine=affine, track_running_stats=track).to(device, dtype)
    with torch.no_grad():
        for tensor in (*module.parameters(), module.running_mean, module.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
    kept = (module.running_mean, module.running_var, module.num_batches_tracked)
    return BatchNorm(module.weight, module.bias, *kept, batch_stats, momentum, module.eps), module


def placed(memory, norm):
    """``norm`` with floating-point tensors of its own, between guards."""
    own = (None if t is None else memory.place(t.detach()) for t in norm[:4])
    tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    return norm._replace(**dict(zip(BatchNorm._fields, (*own, tracked), strict=False)))


def allocate(x, *shapes, dtype=torch.float32):
    return [common.allocate(shape, x, dtype) for shape in shapes]


def gram_of(x, programs=None):
    """Records of all programs, and the one that torch merges them to."""
    C = x.shape[1]
    (partials,) = allocate(x, (programs or moments.gram_programs(x), 1 + C + C * C))
    moments.gram_launch(x, partials).run(x.device)
    n, mean, second = partials[:, 0].double(), partials[:, 1 : 1 + C].double(), partials[:, 1 + C :].double()
    whole = n @ mean / n.sum().clamp(min=1)
    second = second.sum(0).view(C, C) + (mean.t() * n) @ mean - n.sum() * whole.outer(whole)
    return partials, torch.cat([n.sum()[None], whole, second.flatten()])


def merge_gram(partials, C):
    (merged,) = allocate(partials, partials.shape[1:], dtype=torch.float64)
    gram_norm.merge_gram_launch(partials, merged, C).run(partials.device)
    return merged


def merge_moments(partials, C):
    """As a norm with nothing of its own merges them."""
    return normalise(partials, BatchNorm(None, None, None, None, None, batch_stats=True), C)[1]


def normalise_gram(gram, weight, norm):
    stats, kappa = allocate(gram, (4, len(weight)), (len(weight),))
    gram_norm.normalise_gram_launch(gram, weight, norm, stats, kappa).run(gram.device)
    return stats, kappa


def normalise(partials, norm, C, kappa=None, stats=None, update=True):
    (merged,) = allocate(partials, (1 + 2 * C,), dtype=torch.float64)
    stats = allocate(partials, (4, C))[0] if stats is None else stats
    norms.normalise_launch(partials, norm, stats, merged, kappa, update=update).run(partials.device)
    return stats, merged


def stats_truth(mean, var, norm):
    """``[4, C]`` in fp64."""
    rstd = (var + norm.eps).rsqrt()
    scale = rstd if norm.weight is None else norm.weight.double() * rstd
    shift = (0.0 if norm.bias is None else norm.bias.double()) - mean * scale
    return torch.stack([mean, rstd, scale, shift])


def assert_stats(got, want, tolerance=1e-5):
    """A shift is a difference of two terms, of which the larger counts."""
    for name, one, truth in zip(("mean", "rstd", "scale", "shift"), got, want, strict=True):
        floor = tolerance * (want[0] * want[2]).abs() if name == "shift" else 0.0
        error = (one.double() - truth).abs() - floor
        assert (error <= tolerance * truth.abs() + tolerance).all(), f"{name}: {one} instead of {truth}"


def assert_gram(merged, x):
    C = x.shape[1]
    mean, second = gram_truth(x)
    deviations = second.diagonal().sqrt()
    assert merged[0] == x.numel() // C
    off = (merged[1 : 1 + C] - mean).abs()
    assert (off <= FP32 * (deviations / merged[0].sqrt() + mean.abs())).all(), off
    error = (merged[1 + C :].view(C, C) - second).abs()
    assert (error <= FP32 * deviations[:, None] * deviations + 1e-30).all(), error.max()


GRAMS = {
    "channels that fill no vector": (2, 3, 7, 5),
    "several programs": (3, 8, 9, 11),
    "one block of 16, full": (2, 16, 16, 17),
    "one block of 32, not full": (1, 24, 27, 23),
    "two blocks, the last one short": (2, 40, 19, 11),
    "four blocks of which three are computed": (1, 96, 31, 29),
    "one pixel": (1, 8, 1, 1),
}


def test_the_gram_matrix_is_of_x_as_tf32_multiplies_it(device, memory, monkeypatch):
    monkeypatch.setattr(common, "multiplies_tf32", lambda x: True)
    x = memory.place(images((2, 24, 9, 7), torch.float32, device, 8.0))
    got = gram_of(x)[1]
    truth = record_of(rows_of((x.view(torch.int32) & -0x2000).view(torch.float32)), gram=True)
    mean, plain = truth[1:25], rows_of(x).mean(0)
    assert (got[1:25] - mean).abs().max() < 0.01 * (plain - mean).abs().max()
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item())


@pytest.mark.parametrize("shape", GRAMS.values(), ids=GRAMS.keys())
def test_gram(shape, dtype, device, memory):
    x = memory.place(images(shape, dtype, device))
    partials, merged = gram_of(x)
    assert_gram(merged, x)
    assert len(partials) > 1 or shape[0] * shape[2] * shape[3] < 1600


@pytest.mark.parametrize("mean", [2, 1000])
def test_gram_of_means_far_from_zero(mean, dtype, device, memory):
    x = memory.place(images((2, 8, 13, 11), dtype, device, mean))
    assert_gram(gram_of(x)[1], x)


@pytest.mark.parametrize("mean", [0, 1000])
def test_gram_is_the_same_for_any_number_of_programs_and_some_may_be_empty(mean, dtype, device, memory):
    x = memory.place(images((1, 8, 15, 10), dtype, device, mean))
    for programs in (1, 12):
        partials, merged = gram_of(x, programs)
        assert partials[:, 0].sum() == 150
        assert_gram(merged, x)


def test_gram_of_a_constant_image_is_zero(dtype, device, memory):
    values = torch.tensor([0.0, 0.1, -3.3, 1000.0], device=device).to(dtype).view(1, 4, 1, 1)
    x = memory.place(nhwc(values.expand(2, 4, 9, 12)))
    merged = gram_of(x)[1]
    assert_gram(merged, x)
    assert (merged[5:].abs() <= 1e-6).all()


def test_gram_of_an_empty_batch_counts_nothing(device, memory):
    x = images((0, 8, 3, 3), torch.float32, device)
    assert gram_of(x)[1].eq(0).all()


def test_offsets_beyond_2_to_the_31(device):
    C, pixels = 2**26, 40  # memory that is asked for and not touched costs nothing
    x = torch.empty(1, C, pixels, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    near = torch.randn(1, 16, pixels, 1, device=device).half()
    x[:, :16] = near
    partials = torch.empty(1, 2**30 + 2**27, device=device)
    launch = moments.gram_launch(x, partials)
    launch._replace(grid=(1, 1, 1), arguments={**launch.arguments, "BLOCK_C": 16}).run(device)
    rows = partials[0, 1 + C :].as_strided((16, 16), (C, 1))
    mean, second = gram_truth(near)
    torch.testing.assert_close(partials[0, 1:17].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.double(), second, rtol=1e-4, atol=1e-3)


def test_two_runs_give_the_same_bits(dtype, device, memory):
    x = memory.place(images((2, 8, 13, 11), dtype, device))
    assert torch.equal(*(gram_of(x)[1] for _ in range(2)))


RECORDS = {
    "moments, a long walk": (5, False, 270),
    "moments of two ranks": (20, False, 2),
    "gram": (6, True, 3),
    "gram, a long walk": (5, True, 270),
    "gram, wide": (70, True, 18),
    "one channel": (1, True, 2),
}


@pytest.mark.parametrize(("C", "gram", "P"), RECORDS.values(), ids=RECORDS.keys())
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_merged_records_are_the_record_of_all(C, gram, P, kind, device, memory):
    parts = [100 + torch.randn(1 + p % 4, C, device=device, dtype=torch.float64) for p in range(P)]
    records = torch.stack([record_of(part, gram) for part in parts]).to(kind)
    whole = record_of(torch.cat(parts), gram)
    rounding = 2e-15 * whole[0].item() * 100**2  # of n mean^2, beside which covariances are small
    exact = {"rtol": 1e-9, "atol": max(1e-9, rounding)}
    tolerance = exact if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    merged = (merge_gram if gram else merge_moments)(memory.place(records), C)
    torch.testing.assert_close(merged, whole, **tolerance)


def test_records_may_be_a_stack_with_a_stride(device, memory):
    x = torch.randn(40, 6, device=device, dtype=torch.float64)
    buffer = torch.full((4, 50), float("nan"), device=device, dtype=torch.float64)
    for row, part in zip(buffer, x.split(10), strict=True):
        row[:43] = record_of(part, gram=True)
    torch.testing.assert_close(merge_gram(memory.place(buffer)[:, :43], 6), record_of(x, gram=True))
    with pytest.raises(ValueError, match="partials: expected records of"):
        gram_norm.merge_gram_launch(buffer, buffer[0], 6)


NORMS = {
    "momentum": {},
    "cumulative": {"momentum": None},
    "no weight": {"affine": False},
    "no running statistics": {"track": False},
    "fp64": {"dtype": torch.float64},
    "cumulative, no weight": {"momentum": None, "affine": False},
    "half": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS.keys())
def test_normalise_is_batchnorm(options, device, memory):
    C = 11
    given, module = norm_of(C, device, **options)
    norm = placed(memory, given)
    truth = module.double()
    for P in (3, 300):
        pixels = 3 + torch.randn(2 * P, C, device=device, dtype=torch.float64)
        truth(pixels.view(P, 2, C, 1).permute(0, 2, 1, 3))
        norms.count_batch(norm)
        records = torch.stack([record_of(part) for part in pixels.split(2)])
        stats, merged = normalise(memory.place(records.float()), norm, C)
    mean, var = pixels.mean(0), pixels.var(0, unbiased=False)
    torch.testing.assert_close(merged, record_of(pixels), rtol=1e-5, atol=1e-5)
    assert_stats(stats, stats_truth(mean, var, norm))
    half = {"rtol": 2**-7, "atol": 0.01} if options.get("dtype") == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        got, want = getattr(norm, name), getattr(truth, name)
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, check_dtype=False, **half)


def test_a_cumulative_average_without_a_counter_never_moves(device, memory):
    norm = placed(memory, norm_of(4, device, momentum=None)[0]._replace(num_batches_tracked=None))
    before = norm.running_mean.clone()
    normalise(memory.place(record_of(torch.randn(9, 4, device=device).double())[None]), norm, 4)
    assert torch.equal(norm.running_mean, before)


def test_running_statistics_stay_where_no_update_is_asked_for_and_one_pixel_gives_numbers(device, memory):
    norm = placed(memory, norm_of(4, device)[0])
    before = norm.running_mean.clone(), norm.running_var.clone()
    pixel = torch.randn(1, 4, device=device).double()
    record = memory.place(record_of(pixel)[None])
    normalise(record, norm, 4, update=False)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    stats, _ = normalise(record, norm, 4)
    assert_stats(stats, stats_truth(pixel[0], torch.zeros_like(pixel[0]), norm))
    torch.testing.assert_close(norm.running_var, 0.9 * before[1])


def test_flagged_channels_of_two_ranks_are_merged_and_the_others_not_read(device, memory):
    C = 20
    pixels = torch.randn(60, C, device=device, dtype=torch.float64)
    kappa = memory.place(torch.where(torch.arange(C, device=device) % 9 == 8, float("inf"), 1.0))  # in later blocks
    norm = placed(memory, norm_of(C, device)[0])
    before = norm.running_mean.clone()
    own = []
    for part in pixels.split((20, 40)):
        records = torch.stack([record_of(chunk) for chunk in part.split(10)])
        records[:, 1:].view(-1, 2, C)[..., kappa <= KAPPA_MAX] = float("nan")
        own.append(normalise(memory.place(records.float()), norm, C, kappa, update=False)[1])
    assert torch.equal(norm.running_mean, before)
    stats, merged = normalise(memory.place(torch.stack(own)), norm, C, kappa)
    flagged = kappa > KAPPA_MAX
    assert merged[0] == 60
    mean, var = pixels.mean(0), pixels.var(0, unbiased=False)
    assert_stats(stats[:, flagged], stats_truth(mean, var, norm)[:, flagged])
    assert stats[:, ~flagged].isnan().all()
    assert torch.equal(norm.running_mean[~flagged], before[~flagged])


def test_a_variance_that_rounding_made_negative_is_zero(device, memory):
    norm = placed(memory, norm_of(2, device)[0])
    record = torch.tensor([[10.0, 0, 0, -1e-3, -1.0]], device=device)
    before = norm.running_var.clone()
    stats, _ = normalise(memory.place(record), norm, 2)
    zeros = torch.zeros(2, dtype=torch.float64, device=device)
    assert_stats(stats, stats_truth(zeros, zeros, norm))
    torch.testing.assert_close(norm.running_var, 0.9 * before)


EXPANSIONS = {
    "every mask partial": ((3, 3, 7, 5), 10),
    "two blocks of E": ((2, 8, 9, 11), 70),
    "eight rows of the matrix at a time": ((1, 24, 27, 23), 40),
    "channels of X beyond 64": ((1, 70, 9, 11), 12),
}


@pytest.mark.parametrize(("shape", "c_mid"), EXPANSIONS.values(), ids=EXPANSIONS.keys())
def test_normalise_gram_is_batchnorm_of_the_convolution(shape, c_mid, dtype, device, memory):
    x = memory.place(images(shape, dtype, device, 0.5))
    weight = memory.place(weights(c_mid, shape[1], dtype, device))
    given, module = norm_of(c_mid, device)
    norm = placed(memory, given)
    stats, kappa = normalise_gram(memory.place(record_of(rows_of(x), gram=True)), weight, norm)

    exact = weight.double()
    e = F.conv2d(x.double(), exact[:, :, None, None])
    module.double()(e)
    pixels = rows_of(e)
    assert_stats(stats, stats_truth(pixels.mean(0), pixels.var(0, unbiased=False), norm), 1e-4)
    assert (kappa <= KAPPA_MAX).all()
    _, second = gram_truth(x)
    largest = ((exact.abs() @ second.abs()) * exact.abs()).sum(1)
    truth = largest / ((exact @ second) * exact).sum(1)
    torch.testing.assert_close(kappa.double(), truth, rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.running_mean.double(), module.running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var.double(), module.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dead", ["weights", "x"])
def test_a_dead_channel_is_not_flagged(dead, dtype, device, memory):
    x, weight = images((1, 8, 5, 7), dtype, device), weights(6, 8, dtype, device)
    if dead == "x":
        x.zero_()
    else:
        weight[2] = 0
    given = norm_of(6, device)[0]
    norm = placed(memory, given)
    x, weight = memory.place(x), memory.place(weight)
    stats, kappa = normalise_gram(gram_of(x)[1], weight, norm)
    channels = slice(None) if dead == "x" else slice(2, 3)
    zeros = torch.zeros(6, dtype=torch.float64, device=device)
    assert kappa[channels].eq(0).all()
    assert_stats(stats[:, channels], stats_truth(zeros, zeros, norm)[:, channels])
    torch.testing.assert_close(norm.running_var[channels], 0.9 * given.running_var[channels])


def collinear(dtype, device):
    """X of which two channels are nearly equal, and W1 of which rows 3 and 80 take their difference."""
    x = torch.randn(2, 8, 11, 13, device=device)
    x[:, 5] = x[:, 2] + max(3e-4, torch.finfo(dtype).eps) * torch.randn_like(x[:, 5])
    weight = torch.randn(84, 8, device=device)
    weight[[3, 80]] = 0
    weight[3, 2], weight[3, 5], weight[80, 2], weight[80, 5] = 1, -1, -3, 3
    return nhwc(x.to(dtype)), weight.to(dtype)


def direct(x, weight, stats, kappa, programs=None):
    c_mid = len(weight)
    (partials,) = allocate(x, (programs or moments.direct_moments_programs(x, weight), 1 + 2 * c_mid))
    moments.direct_moments_launch(x, weight, stats, kappa, partials).run(x.device)
    return partials


@pytest.mark.parametrize("programs", [None, 9])
def test_cancelling_channels_are_flagged_and_computed_directly(programs, dtype, device, memory):
    x, weight = map(memory.place, collinear(dtype, device))
    given, module = norm_of(84, device)
    norm = placed(memory, given)
    norms.count_batch(norm)
    stats, kappa = normalise_gram(gram_of(x)[1], weight, norm)
    flagged = kappa > KAPPA_MAX
    assert flagged.nonzero().flatten().tolist() == [3, 80]

    e = F.conv2d(x.double(), weight.double()[:, :, None, None])
    pixels = rows_of(e)
    mean, var = pixels.mean(0), pixels.var(0, unbiased=False)
    torch.testing.assert_close(norm.running_mean[flagged], given.running_mean[flagged])
    untouched = [t[..., ~flagged].clone() for t in (stats, norm.running_mean, norm.running_var)]
    stats, merged = normalise(direct(x, weight, stats, kappa, programs), norm, 84, kappa, stats)

    after = (merged[85:][flagged] / merged[0] - var[flagged]).abs() / var[flagged]
    assert (after < 1e-3).all()
    if dtype != torch.bfloat16:  # no nearer than one of its roundings, which the Gram matrix stands
        precise = norm._replace(running_mean=None, running_var=None, eps=1e-12)
        rstd = normalise_gram(gram_of(x)[1], weight, precise)[0][1].double()
        assert ((rstd.square() * var - 1).abs()[flagged] > 1e-3).all()
    assert_stats(stats, stats_truth(mean, var, norm), 1e-4)
    for got, want in zip((stats, norm.running_mean, norm.running_var), untouched, strict=True):
        assert torch.equal(got[..., ~flagged], want)
    module.double()(e)
    torch.testing.assert_close(norm.running_mean.double(), module.running_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var.double(), module.running_var, rtol=1e-4, atol=1e-4)


def test_channels_that_cancel_to_nothing_are_flagged_and_have_no_variance(dtype, device, memory):
    x, weight = collinear(dtype, device)
    x[:, 5] = x[:, 2]
    x, weight = memory.place(x), memory.place(weight)
    norm = placed(memory, norm_of(84, device)[0])
    stats, kappa = normalise_gram(gram_of(x)[1], weight, norm)
    assert kappa[[3, 80]].isinf().all()
    normalise(direct(x, weight, stats, kappa), norm, 84, kappa, stats)
    zeros = torch.zeros(84, dtype=torch.float64, device=device)
    assert_stats(stats[:, [3, 80]], stats_truth(zeros, zeros, norm)[:, [3, 80]])


def test_direct_moments_of_all_channels(dtype, device, memory):
    x = memory.place(images((2, 40, 9, 11), dtype, device, 1))  # two products a pixel
    weight = memory.place(weights(70, 40, dtype, device))
    stats = memory.place(torch.zeros(4, 70, device=device))
    partials = direct(x, weight, stats, memory.place(torch.full((70,), float("inf"), device=device)), 2)
    pixels = rows_of(F.conv2d(x.double(), weight.double()[:, :, None, None]))
    torch.testing.assert_close(merge_moments(partials, 70), record_of(pixels), rtol=1e-4, atol=1e-3)


def test_where_nothing_is_flagged_nothing_is_done(dtype, device, memory):
    x, weight = memory.place(images((1, 8, 5, 7), dtype, device)), memory.place(weights(70, 8, dtype, device))
    norm = placed(memory, norm_of(70, device)[0])
    stats, kappa = normalise_gram(gram_of(x)[1], weight, norm)
    before = stats.clone(), norm.running_mean.clone(), norm.running_var.clone()
    partials = direct(x, weight, stats, kappa, 2)
    assert partials[:, 0].sum() == 35
    _, merged = normalise(partials, norm, 70, kappa, stats)
    assert merged[0] == 35
    assert all(map(torch.equal, (stats, norm.running_mean, norm.running_var), before))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_statistics(affine, device, memory):
    norm = placed(memory, norm_of(130, device, affine=affine, batch_stats=False)[0])
    (stats,) = allocate(norm.running_mean, (4, 130))
    norms.frozen_launch(norm, stats).run(device)
    assert_stats(stats, stats_truth(norm.running_mean.double(), norm.running_var.double(), norm), 1e-6)
    with pytest.raises(ValueError, match="norm: expected running statistics"):
        norms.frozen_launch(norm._replace(running_var=None), stats)


def gradient_sums(x, g, stats, P):
    """Partial sums ``[P, 2, C]`` of a backward pass over ``x`` and ``g [M, C]``."""
    centred = x - stats[0].double()
    pairs = zip(g.chunk(P), centred.chunk(P), strict=True)
    return torch.stack([torch.stack([part.sum(0), (part * c).sum(0)]) for part, c in pairs])


def gradients(partials, stats, record):
    C = stats.shape[1]
    (sums,) = allocate(stats, (2, C), dtype=torch.float64)
    grads, coefs = allocate(stats, (2, C), (3, C))
    norm_grads.norm_grads_launch(partials, stats, record, sums, grads, coefs).run(stats.device)
    return sums, grads, coefs


@pytest.mark.parametrize("frozen", [False, True], ids=["batch statistics", "frozen"])
@pytest.mark.parametrize("P", [1, 260])
def test_gradients_of_batchnorm(frozen, P, device, memory):
    C = 11
    x, g = (2 + torch.randn(780, C, device=device, dtype=torch.float64) for _ in range(2))
    given = norm_of(C, device, batch_stats=not frozen)[0]
    x.requires_grad_()
    weight, bias = (t.detach().double().requires_grad_() for t in (given.weight, given.bias))
    running = given.running_mean.double(), given.running_var.double()
    F.batch_norm(x, *running, weight, bias, not frozen, 0.1, given.eps).backward(g)

    norm = placed(memory, given)
    record = memory.place(record_of(x.detach()))
    if frozen:
        (stats,) = allocate(record, (4, C))
        norms.frozen_launch(norm, stats).run(device)
    else:
        stats, _ = normalise(record[None], norm, C)
    partials = memory.place(gradient_sums(x.detach(), g, stats, P).float())
    sums, grads, coefs = gradients(partials, stats, None if frozen else record)
    torch.testing.assert_close(grads.double(), torch.stack([weight.grad, bias.grad]), rtol=1e-5, atol=1e-3)
    ca, cb, cc = coefs.double()
    torch.testing.assert_close(ca * g + cb * x.detach() + cc, x.grad, rtol=1e-4, atol=1e-5)
    if frozen:
        assert coefs[1:].eq(0).all()

    # Two ranks that hold half of the partials each come to the same, by stacked sums.
    ranks = torch.stack([partials[P // 2 :].double().sum(0), partials[: P // 2].double().sum(0)])
    again = gradients(memory.place(ranks), stats, None if frozen else record)
    for one, other in zip((sums, grads, coefs), again, strict=True):
        torch.testing.assert_close(one, other, **SAME)


def assert_counted(launch, formula):
    counter = count(launch)
    assert counter.outside == 0
    assert counter.total == formula, counter.by_tensor


@interpreted
@pytest.mark.parametrize(
    ("shape", "programs", "dtype"),
    [
        ((1, 3, 1, 1), None, torch.float16),
        ((3, 8, 9, 11), 9, torch.float16),
        ((3, 8, 9, 11), None, torch.float32),
        ((1, 70, 13, 7), 2, torch.float16),
    ],
    ids=["one pixel", "empty programs", "fp32", "two blocks"],
)
def test_bytes_of_statistics(shape, programs, dtype):
    device = "cpu"
    x, C, c_mid = images(shape, dtype, device), shape[1], 20 * shape[0] - 10
    partials = torch.zeros(programs or moments.gram_programs(x), 1 + C + C * C)
    assert_counted(moments.gram_launch(x, partials), moments.gram_bytes(x, partials))
    merged = torch.zeros(1 + C + C * C, dtype=torch.float64)
    assert_counted(gram_norm.merge_gram_launch(partials, merged, C), gram_norm.merge_gram_bytes(partials, merged, C))
    weight, stats = weights(c_mid, C, dtype, device), torch.zeros(4, c_mid)
    partials = torch.zeros(programs or moments.direct_moments_programs(x, weight), 1 + 2 * c_mid)
    for kappa, flagged in ((torch.zeros(c_mid), False), (torch.full((c_mid,), 1e5), True)):
        arguments = (x, weight, stats, kappa, partials)
        formula = moments.direct_moments_bytes(*arguments, flagged=flagged)
        assert_counted(moments.direct_moments_launch(*arguments), formula)
    norm = norm_of(c_mid, device)[0]
    gram = torch.rand(1 + C + C * C, dtype=torch.float64)
    gram[1 + C :] = torch.eye(C).flatten()
    for given in (norm, norm._replace(running_mean=None, running_var=None)):
        arguments = (gram, weight, given, stats, torch.zeros(c_mid))
        assert_counted(gram_norm.normalise_gram_launch(*arguments), gram_norm.normalise_gram_bytes(*arguments))


@interpreted
@pytest.mark.parametrize("options", [{}, {"affine": False, "momentum": None}, {"track": False}], ids=str)
@pytest.mark.parametrize("P", [2, 300])
def test_bytes_of_norms(options, P):
    C, device = 20, "cpu"
    norm, stats = norm_of(C, device, **options)[0], torch.ones(4, C)
    if norm.num_batches_tracked is not None:
        norms.count_batch(norm)
    grams, merged = torch.ones(P, 1 + C + C * C), torch.zeros(1 + C + C * C, dtype=torch.float64)
    assert_counted(gram_norm.merge_gram_launch(grams, merged, C), gram_norm.merge_gram_bytes(grams, merged, C))
    partials, merged = torch.ones(P, 1 + 2 * C), torch.zeros(1 + 2 * C, dtype=torch.float64)
    for kappa, flagged in ((None, False), (torch.zeros(C), False), (torch.full((C,), 1e5), True)):
        arguments = (partials, norm, stats, merged, kappa)
        formula = norms.normalise_bytes(*arguments, flagged=flagged)
        assert_counted(norms.normalise_launch(*arguments), formula)
    formula = norms.normalise_bytes(*arguments, update=False, flagged=True)
    assert_counted(norms.normalise_launch(*arguments, update=False), formula)
    if norm.running_mean is not None:
        assert_counted(norms.frozen_launch(norm, stats), norms.frozen_bytes(norm, stats))
    outputs = (torch.zeros(2, C, dtype=torch.float64), torch.zeros(2, C), torch.zeros(3, C))
    for record in (merged, None):
        arguments = (torch.ones(P, 2, C), stats, record, *outputs)
        assert_counted(norm_grads.norm_grads_launch(*arguments), norm_grads.norm_grads_bytes(*arguments))
