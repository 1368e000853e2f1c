"""BatchNorm 1 from the Gram record of X: records merged, and E = X W1 normalised without E.

    mean(E)_e = mean(X) w_e,   var(E)_e = w_e^T Cov(X) w_e,   kappa_e = |w_e|^T |Cov(X)| |w_e| / (w_e^T Cov(X) w_e)

``moments.py`` leaves the records and says what kappa is for, ``norms.py`` has the names of records and stats and how
records are merged.

Precision: W1 in X's type, records as they come; all else in fp64, stats and kappa rounded to fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import BatchNorm, Launch, Traffic, cdiv
from .moments import KAPPA_MAX
from .norms import (
    affine_arguments,
    nbytes_of,
    running_arguments,
    running_bytes,
    store_rounded,
    update_running,
    variance,
    write_stats,
)
from .partials import partial_blocks

UNROLL = 8  # rows of a Gram matrix on their way at once; of 16 some spill


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
    var = variance(second, n)
    store_rounded(kappa_ptr, offs_e, kappa, mask_e)
    write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs_e, mask_e, c_mid)
    safe = mask_e & (kappa.to(tl.float32) <= KAPPA_MAX)  # as those who read it compare it
    update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, n, mean, var, offs_e, safe)


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
        **affine_arguments(norm),
        **running_arguments(norm, update=True),
        eps=float(norm.eps),
        c_mid=c_mid,
        c_in=c_in,
        KAPPA_MAX=KAPPA_MAX,
        UNROLL=UNROLL,
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )
    return Launch(_normalise_gram_kernel, (cdiv(c_mid, block_e),), arguments, num_warps=4, spill_bytes=8)


def normalise_gram_bytes(gram: Tensor, weight: Tensor, norm: BatchNorm, stats: Tensor, kappa: Tensor) -> Traffic:
    """Bytes of ``normalise_gram_launch`` where no channel is flagged: W1 by rows and again by columns, the record in
    each program.
    """
    programs = normalise_gram_launch(gram, weight, norm, stats, kappa).grid[0]
    running, tracked = running_bytes(norm, update=True)
    channels = nbytes_of(norm.weight, norm.bias) + running
    written = stats.nbytes + kappa.nbytes + running
    loaded = programs * (gram.nbytes + tracked) + 2 * weight.nbytes + channels
    return Traffic(gram.nbytes + tracked + weight.nbytes + channels, written, loaded, written)
