"""BatchNorm's statistics a channel, from moments that passes over the images leave, or from the running ones.

    mean, var (biased)    from moments records; of E = X W1 from the Gram record of X in ``gram_norm.py``
    rstd = 1 / sqrt(var + eps),   scale = gamma rstd,   shift = beta - mean scale:   z = scale x + shift

What the finalisers of a norm take and leave, here, in ``gram_norm.py`` and in ``norm_grads.py``:

====================  ==============================================================================
moments record        ``[1 + 2 C]``: count, mean, sum (x - mean)^2
gram record           ``[1 + C + C C]``: count, mean, sum (x - mean) (x - mean)^T
stats                 ``[4, C]`` fp32: mean, rstd, scale, shift
sums                  ``[2, C]``: sum g, sum g (x - mean)
coefs                 ``[3, C]`` fp32: ca, cb, cc of ``norm_grads.py``
====================  ==============================================================================

Records and sums come as partials ``[P, L]``, one a program in fp32 or one a rank in fp64, and are merged in the same
way, in an order that depends on P alone (Chan, Golub and LeVeque 1983):

    n = sum n_p,   mean = sum n_p mean_p / n,   second = sum second_p + sum n_p mean_p mean_p^T - n mean mean^T

Precision: all of this is computed in fp64, where that difference of squares costs nothing. Merged records are fp64,
stats are rounded to fp32, running statistics to their own type.
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


@triton.jit
def load_fp64(ptr, offs, mask, otherwise: tl.constexpr):
    """Numbers in fp64, ``otherwise`` where there is no tensor."""
    if ptr is None:
        value = tl.full(offs.shape, otherwise, tl.float64)
    else:
        value = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float64)
    return value


@triton.jit
def store_rounded(ptr, offs, value, mask):
    """Store fp64 numbers in the tensor's type."""
    if ptr.dtype.element_ty == tl.float64:
        tl.store(ptr + offs, value, mask=mask)
    else:  # in two steps, as the interpreter has no fp64 to bf16
        tl.store(ptr + offs, value.to(tl.float32).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def variance(second, n):
    """Biased; rounding can make it less than zero. NaN stays."""
    var = second / tl.maximum(n, 1.0)
    return tl.where(var < 0, 0.0, var)


@triton.jit
def write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, mask, C):
    """Mean, rstd, scale and shift of the channels in ``mask``."""
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = load_fp64(weight_ptr, offs, mask, 1.0) * rstd
    shift = load_fp64(bias_ptr, offs, mask, 0.0) - mean * scale
    store_rounded(stats_ptr, offs, mean, mask)
    store_rounded(stats_ptr, C + offs, rstd, mask)
    store_rounded(stats_ptr, 2 * C + offs, scale, mask)
    store_rounded(stats_ptr, 3 * C + offs, shift, mask)


@triton.jit
def update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, n, mean, var, offs, mask):
    """The running statistics' step towards the batch's, whose variance is unbiased for it."""
    factor = momentum
    if tracked_ptr is not None:
        factor = 1.0 / tl.load(tracked_ptr).to(tl.float64)
    factor = tl.where(n > 0, factor, 0.0)  # an empty batch says nothing
    if running_mean_ptr is not None:
        running = load_fp64(running_mean_ptr, offs, mask, 0.0)
        store_rounded(running_mean_ptr, offs, running + factor * (mean - running), mask)
    if running_var_ptr is not None:
        running = load_fp64(running_var_ptr, offs, mask, 0.0)
        unbiased = var * (n / tl.maximum(n - 1.0, 1.0))
        store_rounded(running_var_ptr, offs, running + factor * (unbiased - running), mask)


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
    var = variance(merged, total)
    tl.store(merged_ptr, total, mask=tl.program_id(0) == 0)
    tl.store(merged_ptr + 1 + offs, mean, mask=wanted)
    tl.store(merged_ptr + 1 + C + offs, merged, mask=wanted)
    write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, wanted, C)
    update_running(running_mean_ptr, running_var_ptr, tracked_ptr, momentum, total, mean, var, offs, wanted)


@triton.jit(do_not_specialize=["eps", "C"])
def _frozen_kernel(running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, stats_ptr, eps, C, BLOCK_C: tl.constexpr):
    # A program owns BLOCK_C channels.
    offs = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    mean = load_fp64(running_mean_ptr, offs, mask, 0.0)
    var = load_fp64(running_var_ptr, offs, mask, 1.0)
    write_stats(stats_ptr, weight_ptr, bias_ptr, mean, var, eps, offs, mask, C)


def count_batch(norm: BatchNorm) -> None:
    """Add one to ``num_batches_tracked`` where the batch's own statistics are taken: before the running update."""
    if norm.batch_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


def nbytes_of(*tensors: Tensor | None) -> int:
    """Bytes of those tensors that are there."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def affine_arguments(norm: BatchNorm) -> dict[str, Tensor | None]:
    """Weight and bias, as the kernels name them."""
    return dict(weight_ptr=norm.weight, bias_ptr=norm.bias)


def running_arguments(norm: BatchNorm, update: bool) -> dict[str, Any]:
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


def running_bytes(norm: BatchNorm, update: bool) -> tuple[int, int]:
    """Bytes of the running statistics that a launch updates, and of the counter that each program reads."""
    at = running_arguments(norm, update)
    return nbytes_of(at["running_mean_ptr"], at["running_var_ptr"]), nbytes_of(at["tracked_ptr"])


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
        **affine_arguments(norm),
        **running_arguments(norm, update),
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
    looks = nbytes_of(kappa)
    counts = P * partials.element_size()
    running, tracked = running_bytes(norm, update)
    if kappa is not None and not flagged:
        read = looks + counts + tracked
        return Traffic(read, merged.element_size(), read, merged.element_size())
    channels = looks + P * (L - 1) * partials.element_size() + nbytes_of(norm.weight, norm.bias) + running
    written = stats.nbytes + merged.nbytes + running
    return Traffic(channels + counts + tracked, written, channels + programs * (counts + tracked), written)


def frozen_launch(norm: BatchNorm, stats: Tensor) -> Launch:
    """``stats [4, C]`` from the running statistics of ``norm``: evaluation, or frozen. A program owns BLOCK_C of C."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: expected running statistics where the batch's are not taken, got None")
    running = dict(running_mean_ptr=norm.running_mean, running_var_ptr=norm.running_var)
    sizes = dict(eps=float(norm.eps), C=stats.shape[1], BLOCK_C=BLOCK_C)
    arguments = dict(**running, **affine_arguments(norm), stats_ptr=stats, **sizes)
    return Launch(_frozen_kernel, (cdiv(stats.shape[1], BLOCK_C),), arguments, num_warps=4)


def frozen_bytes(norm: BatchNorm, stats: Tensor) -> Traffic:
    """Bytes of ``frozen_launch``."""
    read = nbytes_of(norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return Traffic(read, stats.nbytes, read, stats.nbytes)
