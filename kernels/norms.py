"""BatchNorm's numbers a channel, from what passes over the images leave: statistics, running updates, gradients.

    mean, var (biased)    from moments records, or of E = X W1 from the Gram record of X (``moments.py``)
    rstd = 1 / sqrt(var + eps),   scale = gamma rstd,   shift = beta - mean scale:   z = scale x + shift
    dbeta = sum g,   dgamma = rstd sum g (x - mean),   dx = ca g + cb x + cc   for a gradient g of z, with
    ca = scale,   cb = -scale rstd dgamma / n,   cc = -scale dbeta / n - cb mean   (cb = cc = 0 with frozen statistics)

====================  ==============================================================================
moments record        ``[1 + 2 C]``: count, mean, sum (x - mean)^2
gram record           ``[1 + C + C C]``: count, mean, sum (x - mean) (x - mean)^T
stats                 ``[4, C]`` fp32: mean, rstd, scale, shift
sums                  ``[2, C]``: sum g, sum g (x - mean)
coefs                 ``[3, C]`` fp32: ca, cb, cc
====================  ==============================================================================

Records and sums come as partials ``[P, L]``, one a program in fp32 or one a rank in fp64, and are merged in the same
way, in an order that depends on P alone (Chan, Golub and LeVeque 1983):

    n = sum n_p,   mean = sum n_p mean_p / n,   second = sum second_p + sum n_p mean_p mean_p^T - n mean mean^T

Precision: all of this is computed in fp64, where that difference of squares costs nothing. Merged records and sums are
fp64; stats, coefs and gradients are rounded to fp32, running statistics to their own type.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .common import BatchNorm, Launch, Traffic, cdiv
from .moments import KAPPA_MAX
from .partials import partial_blocks

BLOCK_C = 128  # where there is nothing to walk over
UNROLL = 8  # rows of a Gram matrix on their way at once; of 16 some spill


@triton.jit
def _load(ptr, offs, mask, otherwise: tl.constexpr):
    """Numbers in fp64, ``otherwise`` where there is no tensor."""
    if ptr is None:
        value = tl.full(offs.shape, otherwise, tl.float64)
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float64)
    return value


@triton.jit
def _store(ptr, offs, value, mask):
    """Store fp64 numbers in the tensor's type."""
    if ptr.dtype.element_ty == tl.float64:
        tl.store(ptr + offs, value, mask=mask)
    else:  # in two steps, as the interpreter has no fp64 to bf16
        tl.store(ptr + offs, value.to(tl.float32).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _variance(second, n):
    """Biased; rounding can make it less than zero. NaN stays."""
    var = second / tl.maximum(n, 1.0)
    return tl.where(var < 0, 0.0, var)


@triton.jit
def _write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, mask, C):
    """Mean, rstd, scale and shift of the channels in ``mask``."""
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = _load(weight_ptr, offs, mask, 1.0) * rstd
    shift = _load(bias_ptr, offs, mask, 0.0) - mean * scale
    _store(stats_ptr, offs, mean, mask)
    _store(stats_ptr, C + offs, rstd, mask)
    _store(stats_ptr, 2 * C + offs, scale, mask)
    _store(stats_ptr, 3 * C + offs, shift, mask)


@triton.jit
def _update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, n, mean, var, offs, mask):
    """The running statistics' step towards the batch's, whose variance is unbiased for it."""
    factor = momentum
    if tracked_ptr is not None:
        factor = 1.0 / tl.load(tracked_ptr).to(tl.float64)
    factor = tl.where(n > 0, factor, 0.0)  # an empty batch says nothing
    if running_mean_ptr is not None:
        running = _load(running_mean_ptr, offs, mask, 0.0)
        _store(running_mean_ptr, offs, running + factor * (mean - running), mask)
    if running_var_ptr is not None:
        running = _load(running_var_ptr, offs, mask, 0.0)
        unbiased = var * (n / tl.maximum(n - 1.0, 1.0))
        _store(running_var_ptr, offs, running + factor * (unbiased - running), mask)


@triton.jit(do_not_specialize=["stride", "P", "C"])
def _merge_gram_kernel(partials_ptr, merged_ptr, stride, P, C, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # A program owns BLOCK_N of the second moments, and the means of those of them that come first in their row.
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i, offs_j, mask_n = offs_n // C, offs_n % C, offs_n < C * C
    n = tl.zeros([BLOCK_P], tl.float64)
    sum_i = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    sum_j = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    second = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for p in range(0, P, BLOCK_P):
        mask_p = p + offs_p < P
        record = partials_ptr + (p + offs_p).to(tl.int64) * stride
        ptrs, mask = record[:, None] + 1, mask_p[:, None] & mask_n[None, :]
        count = tl.load(record, mask=mask_p, other=0.0).to(tl.float64)
        mean_i = tl.load(ptrs + offs_i[None, :], mask=mask, other=0.0).to(tl.float64)
        mean_j = tl.load(ptrs + offs_j[None, :], mask=mask, other=0.0).to(tl.float64)
        own = tl.load(ptrs + C + offs_n[None, :], mask=mask, other=0.0).to(tl.float64)
        n += count
        sum_i += count[:, None] * mean_i
        sum_j += count[:, None] * mean_j
        second += own + count[:, None] * mean_i * mean_j
    total = tl.sum(n, axis=0)
    mean = tl.sum(sum_i, axis=0) / tl.maximum(total, 1.0)
    merged = tl.sum(second, axis=0) - mean * tl.sum(sum_j, axis=0)
    tl.store(merged_ptr, total, mask=tl.program_id(0) == 0)
    tl.store(merged_ptr + 1 + offs_i, mean, mask=mask_n & (offs_j == 0))
    tl.store(merged_ptr + 1 + C + offs_n, merged, mask=mask_n)


@triton.jit(do_not_specialize=["stride", "P", "C", "momentum", "eps"])
def _normalise_kernel(
    partials_ptr,
    stats_ptr,
    merged_ptr,
    kappa_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    momentum,
    eps,
    stride,
    P,
    C,
    KAPPA_MAX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program owns BLOCK_N channels. kappa_ptr is None where all of them are wanted.
    offs_p = tl.arange(0, BLOCK_P)
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = offs < C
    if kappa_ptr is not None:
        wanted = wanted & (tl.load(kappa_ptr + offs, mask=wanted, other=0.0) > KAPPA_MAX)
        if (tl.program_id(0) > 0) & (tl.max(wanted.to(tl.int32), axis=0) == 0):
            return  # the first program stays for the count
    n = tl.zeros([BLOCK_P], tl.float64)
    sums = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    second = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for p in range(0, P, BLOCK_P):
        mask_p = p + offs_p < P
        record = partials_ptr + (p + offs_p).to(tl.int64) * stride
        ptrs, mask = record[:, None] + 1 + offs[None, :], mask_p[:, None] & wanted[None, :]
        count = tl.load(record, mask=mask_p, other=0.0).to(tl.float64)
        mean = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
        own = tl.load(ptrs + C, mask=mask, other=0.0).to(tl.float64)
        n += count
        sums += count[:, None] * mean
        second += own + count[:, None] * mean * mean
    total = tl.sum(n, axis=0)
    sum_x = tl.sum(sums, axis=0)
    mean = sum_x / tl.maximum(total, 1.0)
    merged = tl.sum(second, axis=0) - mean * sum_x
    var = _variance(merged, total)
    tl.store(merged_ptr, total, mask=tl.program_id(0) == 0)
    tl.store(merged_ptr + 1 + offs, mean, mask=wanted)
    tl.store(merged_ptr + 1 + C + offs, merged, mask=wanted)
    _write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, wanted, C)
    _update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, total, mean, var, offs, wanted)


@triton.jit(do_not_specialize=["momentum", "eps", "c_mid"])
def _normalise_gram_kernel(
    gram_ptr,
    w_ptr,
    stats_ptr,
    kappa_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    momentum,
    eps,
    c_mid,
    c_in: tl.constexpr,
    KAPPA_MAX: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A program owns BLOCK_E channels of E and walks down the rows of Cov(X): the sums over the columns come last.
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_c = tl.arange(0, BLOCK_C)
    mask_e, mask_c = offs_e < c_mid, offs_c < c_in
    n = tl.load(gram_ptr)
    w_ptrs = w_ptr + offs_e * c_in
    w = tl.load(w_ptrs[:, None] + offs_c[None, :], mask=mask_e[:, None] & mask_c[None, :], other=0.0).to(tl.float64)
    mean = tl.sum(w * tl.load(gram_ptr + 1 + offs_c, mask=mask_c, other=0.0)[None, :], axis=1)
    products = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
    largest = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
    for first in range(0, c_in, UNROLL):
        for u in tl.static_range(UNROLL):
            i = first + u
            row = tl.load(gram_ptr + 1 + c_in + i * c_in + offs_c, mask=mask_c & (i < c_in), other=0.0)
            w_i = tl.load(w_ptrs + i, mask=mask_e & (i < c_in), other=0.0).to(tl.float64)
            products += w_i[:, None] * row[None, :]
            largest += tl.abs(w_i)[:, None] * tl.abs(row)[None, :]
    second = tl.sum(products * w, axis=1)
    bound = tl.sum(largest * tl.abs(w), axis=1)
    kappa = tl.where(second > 0, bound / tl.where(second > 0, second, 1.0), tl.where(bound > 0, float("inf"), 0.0))
    var = _variance(second, n)
    _store(kappa_ptr, offs_e, kappa, mask_e)
    _write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs_e, mask_e, c_mid)
    safe = mask_e & (kappa.to(tl.float32) <= KAPPA_MAX)  # as those who read it compare it
    _update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, n, mean, var, offs_e, safe)


@triton.jit(do_not_specialize=["eps", "C"])
def _frozen_kernel(running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, stats_ptr, eps, C, BLOCK_C: tl.constexpr):
    # A program owns BLOCK_C channels.
    offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    mean = _load(running_mean_ptr, offs, mask, 0.0)
    var = _load(running_var_ptr, offs, mask, 1.0)
    _write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, mask, C)


@triton.jit(do_not_specialize=["stride", "P", "C"])
def _norm_grads_kernel(
    partials_ptr,
    stats_ptr,
    count_ptr,
    sums_ptr,
    grads_ptr,
    coefs_ptr,
    stride,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program owns BLOCK_N channels. count_ptr is None where the statistics are constants.
    offs_p = tl.arange(0, BLOCK_P)
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wanted = offs < C
    sum_g = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for p in range(0, P, BLOCK_P):
        ptrs = partials_ptr + (p + offs_p).to(tl.int64)[:, None] * stride + offs[None, :]
        mask = (p + offs_p < P)[:, None] & wanted[None, :]
        sum_g += tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
        sum_gx += tl.load(ptrs + C, mask=mask, other=0.0).to(tl.float64)
    dbeta = tl.sum(sum_g, axis=0)
    sum_gx = tl.sum(sum_gx, axis=0)
    mean = _load(stats_ptr, offs, wanted, 0.0)
    rstd = _load(stats_ptr, C + offs, wanted, 0.0)
    scale = _load(stats_ptr, 2 * C + offs, wanted, 0.0)
    dgamma = rstd * sum_gx
    cb = tl.zeros([BLOCK_N], tl.float64)
    cc = tl.zeros([BLOCK_N], tl.float64)
    if count_ptr is not None:
        n = tl.maximum(tl.load(count_ptr), 1.0)
        cb = -scale * rstd * dgamma / n
        cc = -scale * dbeta / n - cb * mean
    tl.store(sums_ptr + offs, dbeta, mask=wanted)
    tl.store(sums_ptr + C + offs, sum_gx, mask=wanted)
    _store(grads_ptr, offs, dgamma, wanted)
    _store(grads_ptr, C + offs, dbeta, wanted)
    _store(coefs_ptr, offs, scale, wanted)
    _store(coefs_ptr, C + offs, cb, wanted)
    _store(coefs_ptr, 2 * C + offs, cc, wanted)


def count_batch(norm: BatchNorm) -> None:
    """Add one to ``num_batches_tracked`` where the batch's own statistics are taken: before the running update."""
    if norm.batch_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _affine(norm: BatchNorm) -> dict[str, Tensor | None]:
    return dict(weight_ptr=norm.weight, bias_ptr=norm.bias)


def _running(norm: BatchNorm, update: bool) -> dict[str, Any]:
    """What the kernels need for the running statistics: None for what isn't there or stays as it is."""
    momentum, tracked = norm.momentum, None
    if momentum is None:
        momentum, tracked = 0.0, norm.num_batches_tracked  # not even a counter: torch's factor is 0
    there = update and norm.batch_stats and (norm.running_mean is not None or norm.running_var is not None)
    return dict(
        running_mean_ptr=norm.running_mean if there else None,
        running_var_ptr=norm.running_var if there else None,
        tracked_ptr=tracked if there else None,
        momentum=float(momentum),
    )


def _running_bytes(norm: BatchNorm, update: bool) -> tuple[int, int]:
    """Bytes of the running statistics that a launch updates, and of the counter that each program reads."""
    at = _running(norm, update)
    return _nbytes(at["running_mean_ptr"], at["running_var_ptr"]), _nbytes(at["tracked_ptr"])


def merge_gram_launch(partials: Tensor, merged: Tensor, C: int) -> Launch:
    """Merge gram records of C channels, ``partials [P, L]`` (fp32 or fp64), into ``merged [L]`` (fp64).

    ``partials`` may be a stack of rows with a stride. A program owns BLOCK_N of the second moments.
    """
    P, L = partials.shape
    if L != 1 + C + C * C:
        raise ValueError(f"partials: expected records of 1 + C + C C numbers with C = {C}, got {L}")
    sizes = dict(stride=partials.stride(0), P=P, C=C, **partial_blocks(P))
    arguments = dict(partials_ptr=partials, merged_ptr=merged, **sizes)
    return Launch(_merge_gram_kernel, (cdiv(C * C, sizes["BLOCK_N"]),), arguments, num_warps=8)


def merge_gram_bytes(partials: Tensor, merged: Tensor, C: int) -> Traffic:
    """Bytes of ``merge_gram_launch``: with each second moment its two means, and each program reads the counts."""
    programs, (P, L) = merge_gram_launch(partials, merged, C).grid[0], partials.shape
    loaded = P * (programs + 3 * C * C) * partials.element_size()
    return Traffic(P * L * partials.element_size(), merged.nbytes, loaded, merged.nbytes)


def normalise_launch(
    partials: Tensor,
    norm: BatchNorm,
    stats: Tensor,
    merged: Tensor,
    kappa: Tensor | None = None,
    *,
    update: bool = True,
) -> Launch:
    """Merge moments records ``partials [P, 1 + 2 C]`` (fp32 or fp64, a row may have a stride) and normalise by them.

    Written are the record ``merged [1 + 2 C]`` (fp64), ``stats [4, C]`` and, with ``update``, the running statistics of
    ``norm`` in place, after ``count_batch``. With ``kappa [C]`` only channels of more than ``KAPPA_MAX`` are, and the
    count. Across ranks a first call without an update leaves a rank's own record, and a second one takes the stack of
    all. One pixel's unbiased variance is 0 (torch refuses such a batch). A program owns BLOCK_N channels.
    """
    C, blocks = stats.shape[1], partial_blocks(len(partials))
    arguments = dict(
        partials_ptr=partials,
        stats_ptr=stats,
        merged_ptr=merged,
        kappa_ptr=kappa,
        **_affine(norm),
        **_running(norm, update),
        eps=float(norm.eps),
        stride=partials.stride(0),
        P=len(partials),
        C=C,
        KAPPA_MAX=KAPPA_MAX,
        **blocks,
    )
    return Launch(_normalise_kernel, (cdiv(C, blocks["BLOCK_N"]),), arguments, num_warps=8)


def normalise_bytes(
    partials: Tensor,
    norm: BatchNorm,
    stats: Tensor,
    merged: Tensor,
    kappa: Tensor | None = None,
    *,
    update: bool = True,
    flagged: bool = False,
) -> Traffic:
    """Bytes of ``normalise_launch``; with ``kappa``, where it flags no channel, or all with ``flagged``."""
    P, L = partials.shape
    programs = cdiv(stats.shape[1], partial_blocks(P)["BLOCK_N"])
    looks = _nbytes(kappa)
    counts = P * partials.element_size()
    running, tracked = _running_bytes(norm, update)
    if kappa is not None and not flagged:
        read = looks + counts + tracked
        return Traffic(read, merged.element_size(), read, merged.element_size())
    channels = looks + P * (L - 1) * partials.element_size() + _nbytes(norm.weight, norm.bias) + running
    written = stats.nbytes + merged.nbytes + running
    return Traffic(channels + counts + tracked, written, channels + programs * (counts + tracked), written)


def normalise_gram_launch(gram: Tensor, weight: Tensor, norm: BatchNorm, stats: Tensor, kappa: Tensor) -> Launch:
    """Normalise E = X W1 by the merged ``gram [1 + c_in + c_in c_in]`` (fp64) of X.

    ``weight`` is W1 ``[c_mid, c_in]`` in X's type. Written are ``kappa [c_mid]`` (fp32), ``stats [4, c_mid]`` and the
    running statistics of ``norm``, after ``count_batch``. Channels of kappa above ``KAPPA_MAX`` get their running
    update from ``normalise_launch`` after the direct pass, and then their stats again. kappa is infinite where the
    variance isn't positive, and 0 where nothing varies that could cancel. A program owns BLOCK_E channels of E.
    """
    c_mid, c_in = weight.shape
    block_c = triton.next_power_of_2(c_in)
    block_e = min(max(1024 // block_c, 2), 32)  # 8 elements a thread, of which each is two fp64 sums and a weight
    arguments = dict(
        gram_ptr=gram,
        w_ptr=weight,
        stats_ptr=stats,
        kappa_ptr=kappa,
        **_affine(norm),
        **_running(norm, update=True),
        eps=float(norm.eps),
        c_mid=c_mid,
        c_in=c_in,
        KAPPA_MAX=KAPPA_MAX,
        UNROLL=UNROLL,
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )
    return Launch(_normalise_gram_kernel, (cdiv(c_mid, block_e),), arguments, num_warps=4)


def normalise_gram_bytes(gram: Tensor, weight: Tensor, norm: BatchNorm, stats: Tensor, kappa: Tensor) -> Traffic:
    """Bytes of ``normalise_gram_launch`` where no channel is flagged: W1 by rows and again by columns, the record in
    each program.
    """
    programs = normalise_gram_launch(gram, weight, norm, stats, kappa).grid[0]
    running, tracked = _running_bytes(norm, update=True)
    channels = _nbytes(norm.weight, norm.bias) + running
    written = stats.nbytes + kappa.nbytes + running
    loaded = programs * (gram.nbytes + tracked) + 2 * weight.nbytes + channels
    return Traffic(gram.nbytes + tracked + weight.nbytes + channels, written, loaded, written)


def frozen_launch(norm: BatchNorm, stats: Tensor) -> Launch:
    """``stats [4, C]`` from the running statistics of ``norm``: evaluation, or frozen. A program owns BLOCK_C of C."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected running statistics where the batch's are not taken, got None")
    running = dict(running_mean_ptr=norm.running_mean, running_var_ptr=norm.running_var)
    sizes = dict(eps=float(norm.eps), C=stats.shape[1], BLOCK_C=BLOCK_C)
    arguments = dict(**running, **_affine(norm), stats_ptr=stats, **sizes)
    return Launch(_frozen_kernel, (cdiv(stats.shape[1], BLOCK_C),), arguments, num_warps=4)


def frozen_bytes(norm: BatchNorm, stats: Tensor) -> Traffic:
    """Bytes of ``frozen_launch``."""
    read = _nbytes(norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return Traffic(read, stats.nbytes, read, stats.nbytes)


def norm_grads_launch(
    partials: Tensor, stats: Tensor, count: Tensor | None, sums: Tensor, grads: Tensor, coefs: Tensor
) -> Launch:
    """Gradients of a BatchNorm from ``partials [P, 2, C]`` (fp32 or fp64; the first stride is free) of its sums.

    ``stats`` is ``[4, C]``, ``count`` the merged record (fp64), whose first number is n, or None with frozen
    statistics. Written are ``sums [2, C]`` (fp64), ``grads [2, C]`` (fp32: dgamma, dbeta) and ``coefs [3, C]`` (fp32).
    Across ranks a first call on a rank's own partials gives its gradients, a second one on the stacked ``sums`` of all
    the coefs. A program owns BLOCK_N channels.
    """
    P, _, C = partials.shape
    blocks = partial_blocks(P)
    arguments = dict(
        partials_ptr=partials,
        stats_ptr=stats,
        count_ptr=count,
        sums_ptr=sums,
        grads_ptr=grads,
        coefs_ptr=coefs,
        stride=partials.stride(0),
        P=P,
        C=C,
        **blocks,
    )
    return Launch(_norm_grads_kernel, (cdiv(C, blocks["BLOCK_N"]),), arguments, num_warps=8)


def norm_grads_bytes(
    partials: Tensor, stats: Tensor, count: Tensor | None, sums: Tensor, grads: Tensor, coefs: Tensor
) -> Traffic:
    """Bytes of ``norm_grads_launch``: all but the shift of ``stats``, and one number of ``count``."""
    P, R, C = partials.shape
    channels = P * R * C * partials.element_size() + stats[:3].nbytes
    n = 0 if count is None else count.element_size()
    written = _nbytes(sums, grads, coefs)
    return Traffic(channels + n, written, channels + cdiv(C, partial_blocks(P)["BLOCK_N"]) * n, written)
