"""Gradients of BatchNorm from the sums that a backward pass leaves, and the coefs by which dx is made of them.

    dbeta = sum g,   dgamma = rstd sum g (x - mean),   dx = ca g + cb x + cc   for a gradient g of z, with
    ca = scale,   cb = -scale rstd dgamma / n,   cc = -scale dbeta / n - cb mean   (cb = cc = 0 with frozen statistics)

``norms.py`` has the names of sums, stats and coefs. Sums come as partials ``[P, 2, C]``, one a program in fp32 or one a
rank in fp64, and are added in an order that depends on P alone.

Precision: all of this is computed in fp64; sums stay so, coefs and gradients are rounded to fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Launch, Traffic, cdiv
from .norms import load_fp64, nbytes_of, store_rounded
from .partials import partial_blocks


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
    mean = load_fp64(stats_ptr, offs, wanted, 0.0)
    rstd = load_fp64(stats_ptr, C + offs, wanted, 0.0)
    scale = load_fp64(stats_ptr, 2 * C + offs, wanted, 0.0)
    dgamma = rstd * sum_gx
    cb = tl.zeros([BLOCK_N], tl.float64)
    cc = tl.zeros([BLOCK_N], tl.float64)
    if count_ptr is not None:
        n = tl.maximum(tl.load(count_ptr), 1.0)
        cb = -scale * rstd * dgamma / n
        cc = -scale * dbeta / n - cb * mean
    tl.store(sums_ptr + offs, dbeta, mask=wanted)
    tl.store(sums_ptr + C + offs, sum_gx, mask=wanted)
    store_rounded(grads_ptr, offs, dgamma, wanted)
    store_rounded(grads_ptr, C + offs, dbeta, wanted)
    store_rounded(coefs_ptr, offs, scale, wanted)
    store_rounded(coefs_ptr, C + offs, cb, wanted)
    store_rounded(coefs_ptr, 2 * C + offs, cc, wanted)


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
    written = nbytes_of(sums, grads, coefs)
    return Traffic(channels + n, written, channels + cdiv(C, partial_blocks(P)["BLOCK_N"]) * n, written)
