"""Gradients of W1 and of BatchNorm 1 from S = X^T dZ1, and M and v, by which X has its part in BN1's statistics.

With W1 [c_in, c_mid] in X's type, n pixels of X with mean m and second moments G = sum (x - m)(x - m)^T, and scale and
rstd of BN1:

    dbeta1  = sum dZ1                               S_c = S - m dbeta1^T
    dgamma1 = rstd diag(W1^T S_c)
    dW1     = (S_c - G W1 diag(rstd dgamma1 / n)) diag(scale)
    M       = W1 diag(scale rstd dgamma1 / n) W1^T          v = W1 (scale dbeta1 / n) - M m

for dX = T - X M - v (see ``expand_grads.py``). Over ranks, n, m, dbeta1 and dgamma1 are those of all ranks. A rank has
its own S and n_l, G_l about its own mean m_l, and with d = m_l - m its part of the gradient, which sums to dW1:

    dW1_l   = (S_c - n_l d dbeta1^T / n - (G_l + n_l d d^T) W1 diag(rstd dgamma1 / n)) diag(scale)

A frozen BN1 has constants for statistics: dW1 = S diag(scale), dgamma1 = rstd (diag(W1^T S) - mean dbeta1).

W1, its gradient and S have torch's layout in memory, [c_mid, c_in]. G and m come as a gram record (see ``norms.py``).

Precision: fp64, but for W1 and M in X's type, M's products, summed in fp32, and v in fp32. Each column of M is divided
by a power of two, so that small gradients don't vanish in fp16, and v is made with the M that is stored: where X has a
large mean, X M + v cancels it exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv
from .moments import truncated


@triton.jit
def _weight(w_ptr, offs_e, offs_i, C_IN: tl.constexpr, C_MID: tl.constexpr):
    """W1 at these channels, which broadcast, in fp32; 0 outside."""
    mask = (offs_e < C_MID) & (offs_i < C_IN)
    return tl.load(w_ptr + offs_e * C_IN + offs_i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gram_product(
    w_ptr,
    gram_ptr,
    offs_e,
    offs_i,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows e of W1 times the second moments of the record at ``gram_ptr``, [BLOCK_E, BLOCK_C] in fp64."""
    product = tl.zeros([BLOCK_E, BLOCK_C], tl.float64)
    for k in range(0, C_IN, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = _weight(w_ptr, offs_e[:, None], offs_k[None, :], C_IN, C_MID).to(tl.float64)
        rows = gram_ptr + 1 + C_IN + offs_k[:, None] * C_IN + offs_i[None, :]
        gram = tl.load(rows, mask=(offs_k < C_IN)[:, None] & (offs_i < C_IN)[None, :], other=0.0)
        product += tl.sum(w[:, :, None] * gram[None, :, :], axis=1)
    return product


@triton.jit
def _expand_weight_grad_kernel(
    s_ptr,
    dbeta_ptr,
    stats_ptr,
    w_ptr,
    gram_ptr,
    local_ptr,
    global_ptr,
    dw_ptr,
    sums_ptr,
    grads_ptr,
    pull_ptr,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns BLOCK_E channels of c_mid. gram_ptr is None where BN1 is frozen, local_ptr and global_ptr where
    # there is one rank, dw_ptr and pull_ptr where the sums alone are wanted.
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_i = tl.arange(0, BLOCK_C)
    mask_e, mask_i = offs_e < C_MID, offs_i < C_IN
    mask, offs = mask_e[:, None] & mask_i[None, :], offs_e[:, None] * C_IN + offs_i[None, :]
    rstd = tl.load(stats_ptr + C_MID + offs_e, mask=mask_e, other=0.0).to(tl.float64)
    dbeta = tl.load(dbeta_ptr + offs_e, mask=mask_e, other=0.0)
    s = tl.load(s_ptr + offs, mask=mask, other=0.0)
    w = _weight(w_ptr, offs_e[:, None], offs_i[None, :], C_IN, C_MID).to(tl.float64)
    if gram_ptr is None:
        mean_e = tl.load(stats_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float64)
        dgamma = rstd * (tl.sum(w * s, axis=1) - mean_e * dbeta)
    else:
        mean = tl.load(gram_ptr + 1 + offs_i, mask=mask_i, other=0.0)
        s -= dbeta[:, None] * mean[None, :]
        dgamma = rstd * tl.sum(w * s, axis=1)
    tl.store(sums_ptr + offs_e, dbeta, mask=mask_e)
    tl.store(sums_ptr + C_MID + offs_e, dgamma, mask=mask_e)
    tl.store(grads_ptr + offs_e, dgamma.to(tl.float32), mask=mask_e)
    tl.store(grads_ptr + C_MID + offs_e, dbeta.to(tl.float32), mask=mask_e)
    if dw_ptr is not None:
        scale = tl.load(stats_ptr + 2 * C_MID + offs_e, mask=mask_e, other=0.0).to(tl.float64)
        pull_gamma, pull_beta = tl.zeros([BLOCK_E], tl.float64), tl.zeros([BLOCK_E], tl.float64)
        if gram_ptr is not None:
            if global_ptr is not None:
                dbeta = tl.load(global_ptr + offs_e, mask=mask_e, other=0.0)
                dgamma = tl.load(global_ptr + C_MID + offs_e, mask=mask_e, other=0.0)
            n = tl.maximum(tl.load(gram_ptr), 1.0)  # of an empty batch
            pull_gamma, pull_beta = rstd * dgamma / n, dbeta / n
            if local_ptr is None:
                product = _gram_product(w_ptr, gram_ptr, offs_e, offs_i, C_IN, C_MID, BLOCK_E, BLOCK_C, BLOCK_K)
            else:
                product = _gram_product(w_ptr, local_ptr, offs_e, offs_i, C_IN, C_MID, BLOCK_E, BLOCK_C, BLOCK_K)
                shift = tl.load(local_ptr + 1 + offs_i, mask=mask_i, other=0.0) - mean
                moved = tl.load(local_ptr) * shift[None, :]
                product += moved * tl.sum(w * shift[None, :], axis=1)[:, None]
                s -= moved * pull_beta[:, None]
            s -= product * pull_gamma[:, None]
        dw = (s * scale[:, None]).to(tl.float32)  # the interpreter has no fp64 to bf16
        tl.store(dw_ptr + offs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
        tl.store(pull_ptr + offs_e, scale * pull_gamma, mask=mask_e)
        tl.store(pull_ptr + C_MID + offs_e, scale * pull_beta, mask=mask_e)


def expand_weight_grad_launch(
    s: Tensor,
    dbeta: Tensor,
    stats: Tensor,
    weight: Tensor,
    gram: Tensor | None,
    local: Tensor | None,
    global_sums: Tensor | None,
    dweight: Tensor | None,
    sums: Tensor,
    grads: Tensor,
    pull: Tensor | None,
) -> Launch:
    """Gradients of W1 and of BN1 from ``s [c_mid, c_in]`` and ``dbeta [c_mid]`` (fp64), the rank's sums of dZ1.

    ``stats [4, c_mid]`` (fp32) are BN1's; ``weight [c_mid, c_in]`` is W1 in X's type.
    ``gram [1 + c_in + c_in^2]`` (fp64) are the moments of X over all ranks, None where BN1 is frozen; ``local`` the
    rank's own, None where it is the only one; ``global_sums [2, c_mid]`` (fp64) the sum of all ranks' ``sums``, None
    where there is one rank.

    Written are ``sums [2, c_mid]`` (fp64: the rank's dbeta1, dgamma1), ``grads [2, c_mid]`` (fp32: dgamma1, dbeta1),
    and, where they are given, ``dweight [c_mid, c_in]``, of any type, and ``pull [2, c_mid]`` (fp64: scale rstd dgamma1
    / n and scale dbeta1 / n, 0 where BN1 is frozen). Several ranks launch twice: for ``sums`` without these two, then
    with ``global_sums``. A program owns BLOCK_E channels of c_mid.
    """
    c_mid, c_in = weight.shape
    tile = training_tiles.weight_grad_tile(c_in)
    arguments = dict(
        s_ptr=s,
        dbeta_ptr=dbeta,
        stats_ptr=stats,
        w_ptr=weight,
        gram_ptr=gram,
        local_ptr=None if gram is None or local is gram else local,
        global_ptr=None if gram is None else global_sums,
        dw_ptr=dweight,
        sums_ptr=sums,
        grads_ptr=grads,
        pull_ptr=pull,
        C_IN=c_in,
        C_MID=c_mid,
        BLOCK_E=tile.BLOCK_M,
        BLOCK_C=triton.next_power_of_2(c_in),
        BLOCK_K=tile.BLOCK_K,
    )
    grid, steps = (cdiv(c_mid, tile.BLOCK_M),), cdiv(c_in, tile.BLOCK_K)
    return Launch(_expand_weight_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def expand_weight_grad_bytes(
    s: Tensor,
    dbeta: Tensor,
    stats: Tensor,
    weight: Tensor,
    gram: Tensor | None,
    local: Tensor | None,
    global_sums: Tensor | None,
    dweight: Tensor | None,
    sums: Tensor,
    grads: Tensor,
    pull: Tensor | None,
) -> Traffic:
    """Bytes of ``expand_weight_grad_launch``: what is of c_mid once, W1 twice, the Gram matrix for each program."""
    c_mid, c_in = weight.shape
    programs = cdiv(c_mid, training_tiles.weight_grad_tile(c_in).BLOCK_M)
    row, mean = stats[0].nbytes, 8 * c_in
    read = s.nbytes + dbeta.nbytes + weight.nbytes + row
    written = sums.nbytes + grads.nbytes
    traffic = Traffic(read, written, read, written)
    if gram is None:
        traffic += Traffic(row, 0, row, 0)
    else:
        traffic += Traffic(mean, 0, programs * mean, 0)
    if dweight is None or pull is None:
        return traffic
    written = dweight.nbytes + pull.nbytes
    traffic += Traffic(row, written, row, written)
    if gram is None:
        return traffic
    if global_sums is not None:
        traffic += Traffic(global_sums.nbytes, 0, global_sums.nbytes, 0)
    alone = local is None or local is gram
    matrix = 8 * (1 + c_in**2) if alone else 8 * (2 + c_in + c_in**2)
    return traffic + Traffic(matrix, 0, programs * matrix + weight.nbytes, 0)


@triton.jit
def _pull_back_kernel(
    w_ptr,
    pull_ptr,
    gram_ptr,
    matrix_ptr,
    scale_ptr,
    vector_ptr,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    PRECISION: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # A program owns BLOCK_N columns of M, whole, as it needs their largest entries.
    dtype: tl.constexpr = matrix_ptr.dtype.element_ty
    offs_i = tl.arange(0, BLOCK_C)
    offs_j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_i, mask_j = offs_i < C_IN, offs_j < C_IN
    matrix = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    vector = tl.zeros([BLOCK_N], tl.float64)
    for k in range(0, C_MID, BLOCK_K):
        offs_e = k + tl.arange(0, BLOCK_K)
        pull = tl.load(pull_ptr + offs_e, mask=offs_e < C_MID, other=0.0).to(tl.float32)
        shift = tl.load(pull_ptr + C_MID + offs_e, mask=offs_e < C_MID, other=0.0)
        w_i = _weight(w_ptr, offs_e[None, :], offs_i[:, None], C_IN, C_MID)
        w_j = _weight(w_ptr, offs_e[:, None], offs_j[None, :], C_IN, C_MID)
        vector += tl.sum(w_j.to(tl.float64) * shift[:, None], axis=0)
        matrix = tl.dot(w_i, w_j * pull[:, None], matrix, input_precision=PRECISION)

    # An exponent is read and made as bits: a product with a power of two rounds nothing. 252 is out of reach, and lets
    # an infinity stay one.
    largest = tl.max(tl.abs(matrix), axis=0)
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 252)
    exponent = tl.where(exponent > 0, exponent, 126)  # of 0, and of what is as good as 0
    scale = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    stored = truncated(matrix * ((253 - exponent) << 23).to(tl.float32, bitcast=True)[None, :], TF32).to(dtype)
    mean = tl.load(gram_ptr + 1 + offs_i, mask=mask_i, other=0.0)
    used = (stored.to(tl.float32) * scale[None, :]).to(tl.float64)
    vector -= tl.sum(mean[:, None] * used, axis=0)
    tl.store(matrix_ptr + offs_i[:, None] * C_IN + offs_j[None, :], stored, mask=mask_i[:, None] & mask_j[None, :])
    tl.store(scale_ptr + offs_j, scale, mask=mask_j)
    tl.store(vector_ptr + offs_j, vector.to(tl.float32), mask=mask_j)


def pull_back_launch(
    weight: Tensor, pull: Tensor, gram: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor
) -> Launch:
    """M and v of ``weight [c_mid, c_in]``, ``pull [2, c_mid]`` and the mean in ``gram [1 + c_in + c_in^2]``, fp64 both.

    ``weight`` is W1 in X's type. M is ``matrix [c_in, c_in]``, of X's type too, times ``scale [c_in]`` (fp32) column by
    column: powers of two with which the largest entry of each column of ``matrix`` is in [0.5, 1). v is ``vector
    [c_in]`` (fp32). W1 in half precision is exact in TF32, and W1 pull has as many bits there as M is stored with. A
    program owns BLOCK_N columns of M.
    """
    (c_mid, c_in), tile = weight.shape, training_tiles.PULL_BACK
    arguments = dict(
        w_ptr=weight,
        pull_ptr=pull,
        gram_ptr=gram,
        matrix_ptr=matrix,
        scale_ptr=scale,
        vector_ptr=vector,
        C_IN=c_in,
        C_MID=c_mid,
        PRECISION="tf32x3" if matrix.dtype == torch.float32 else "tf32",
        TF32=common.multiplies_tf32(matrix),
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        BLOCK_C=max(16, triton.next_power_of_2(c_in)),
    )
    grid, steps = (cdiv(c_in, tile.BLOCK_N),), cdiv(c_mid, tile.BLOCK_K)
    return Launch(_pull_back_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def pull_back_bytes(
    weight: Tensor, pull: Tensor, gram: Tensor, matrix: Tensor, scale: Tensor, vector: Tensor
) -> Traffic:
    """Bytes of ``pull_back_launch``: all of W1 for each program, and its own columns once more."""
    programs, mean = cdiv(weight.shape[1], training_tiles.PULL_BACK.BLOCK_N), 8 * weight.shape[1]
    read, written = weight.nbytes + pull.nbytes + mean, matrix.nbytes + scale.nbytes + vector.nbytes
    return Traffic(read, written, programs * read + weight.nbytes, written)
