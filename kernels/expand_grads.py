"""Gradients of the expansion E = X W1, the products over pixels: S of dZ1, and B3's dX. Neither E nor dE is formed.

    S   = X^T dZ1                    dbeta1 = sum dZ1
    dX  = T - X M - v (+ dY)        T = dZ1 diag(scale) W1^T

with BN1's scale. ``expand_finalisers.py`` makes the gradients of W1 and BN1 from S, and M and v, by which X has its
part in BN1's statistics. A frozen BN1 has constants for statistics: dX = T (+ dY).

W1 has torch's layout in memory, [c_mid, c_in], and so has S once it is summed.

Precision: X, dZ1, W1, T, dY, dX and M in one type, fp16, bf16 or fp32; sums of products in fp32, partials of S too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv


@triton.jit(do_not_specialize=["M", "ROWS", "blocks_n"])
def _expand_sums_kernel(
    x_ptr,
    dz_ptr,
    partials_ptr,
    beta_ptr,
    M,
    ROWS,
    blocks_n,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns BLOCK_M channels of c_mid, BLOCK_N of c_in, and ROWS pixels; neighbours share their pixels.
    first = tl.program_id(1).to(tl.int64) * ROWS
    offs_e = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_e, mask_i = offs_e < C_MID, offs_i < C_IN
    ones = tl.full([BLOCK_K, 8], 1.0, dz_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    beta = tl.zeros([BLOCK_M, 8], tl.float32)
    for k in range(0, ROWS, BLOCK_K):
        pixels = first + k + tl.arange(0, BLOCK_K)
        inside = pixels < M
        dz_ptrs = dz_ptr + (pixels * C_MID)[:, None] + offs_e[None, :]
        x_ptrs = x_ptr + (pixels * C_IN)[:, None] + offs_i[None, :]
        dz = tl.load(dz_ptrs, mask=inside[:, None] & mask_e[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None] & mask_i[None, :], other=0.0)
        total = tl.dot(tl.trans(dz), x, total, input_precision=PRECISION)
        beta = tl.dot(tl.trans(dz), ones, beta, input_precision=PRECISION)
    beta = tl.sum(beta, axis=1) * 0.125  # of eight equal columns
    mask = mask_e & (tl.program_id(0) % blocks_n == 0)
    tl.store(beta_ptr + tl.program_id(1).to(tl.int64) * C_MID + offs_e, beta, mask=mask)
    out = partials_ptr + tl.program_id(1).to(tl.int64) * C_IN * C_MID
    tl.store(out + offs_i[None, :] * C_MID + offs_e[:, None], total, mask=mask_e[:, None] & mask_i[None, :])


def _expand_sums_rows(x: Tensor, dz: Tensor) -> int:
    """Pixels of a program of ``expand_sums_launch``."""
    M, tile = x[:, 0].numel(), _sums_tile(x, dz)
    blocks = cdiv(dz.shape[1], tile.BLOCK_M) * cdiv(x.shape[1], tile.BLOCK_N)
    wanted = cdiv(common.limits(x.device).processors, blocks)
    return max(training_tiles.EXPAND_SUMS_MIN_STEPS, cdiv(cdiv(M, tile.BLOCK_K), wanted)) * tile.BLOCK_K


def expand_sums_programs(x: Tensor, dz: Tensor) -> int:
    """Partials that ``expand_sums_launch`` leaves."""
    return cdiv(x[:, 0].numel(), _expand_sums_rows(x, dz))


def expand_sums_launch(x: Tensor, dz: Tensor, partials: Tensor, beta: Tensor) -> Launch:
    """S of ``x [N, c_in, H, W]`` and ``dz [N, c_mid, H, W]``, in fp32 ``partials [P, c_in, c_mid]``, and dbeta1 in
    ``beta [P, 1, c_mid]``.

    P is ``expand_sums_programs(x, dz)``. A program owns BLOCK_M channels of c_mid, BLOCK_N of c_in, and so many pixels
    that there are about as many programs as processors.
    """
    (N, c_in, H, W), c_mid = x.shape, dz.shape[1]
    tile = _sums_tile(x, dz)
    ROWS, blocks_n = _expand_sums_rows(x, dz), cdiv(c_in, tile.BLOCK_N)
    arguments = dict(
        x_ptr=x,
        dz_ptr=dz,
        partials_ptr=partials,
        beta_ptr=beta,
        M=N * H * W,
        ROWS=ROWS,
        blocks_n=blocks_n,
        C_IN=c_in,
        C_MID=c_mid,
        PRECISION=common.dot_precision(x),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
    )
    grid = (cdiv(c_mid, tile.BLOCK_M) * blocks_n, expand_sums_programs(x, dz))
    steps = cdiv(ROWS, tile.BLOCK_K)
    return Launch(_expand_sums_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def expand_sums_bytes(x: Tensor, dz: Tensor, partials: Tensor, beta: Tensor) -> Traffic:
    """Bytes of ``expand_sums_launch``: X for each block of c_mid, dZ1 for each block of c_in, each partial once."""
    tile = _sums_tile(x, dz)
    loaded = x.nbytes * cdiv(dz.shape[1], tile.BLOCK_M) + dz.nbytes * cdiv(x.shape[1], tile.BLOCK_N)
    written = partials.nbytes + beta.nbytes
    return Traffic(x.nbytes + dz.nbytes, written, loaded, written)


@triton.jit(do_not_specialize=["M", "blocks_n"])
def _input_grad_kernel(
    t_ptr,
    dz_ptr,
    w_ptr,
    stats_ptr,
    x_ptr,
    matrix_ptr,
    scale_ptr,
    vector_ptr,
    dy_ptr,
    dx_ptr,
    M,
    blocks_n,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns BLOCK_M pixels and BLOCK_N channels; those of the same pixels are neighbours. t_ptr or dz_ptr is
    # None, x_ptr where BN1 is frozen or missing, dy_ptr where the block isn't residual.
    pixels = (tl.program_id(0) // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, mask_i = (pixels < M)[:, None], (offs_i < C_IN)[None, :]
    offs, mask = (pixels * C_IN)[:, None] + offs_i[None, :], inside & mask_i
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if x_ptr is not None:
        for k in range(0, C_IN, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C_IN
            x_ptrs = x_ptr + (pixels * C_IN)[:, None] + offs_k[None, :]
            x = tl.load(x_ptrs, mask=inside & mask_k[None, :], other=0.0)
            m_ptrs = matrix_ptr + offs_k[:, None] * C_IN + offs_i[None, :]
            m = tl.load(m_ptrs, mask=mask_k[:, None] & mask_i, other=0.0)
            dx = tl.dot(x, m, dx, input_precision=PRECISION)
        scale = tl.load(scale_ptr + offs_i[None, :], mask=mask_i, other=0.0)
        dx = -(dx * scale + tl.load(vector_ptr + offs_i[None, :], mask=mask_i, other=0.0))
    if dz_ptr is not None:
        for k in range(0, C_MID, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < C_MID
            dz_ptrs = dz_ptr + (pixels * C_MID)[:, None] + offs_k[None, :]
            dz = tl.load(dz_ptrs, mask=inside & mask_k[None, :], other=0.0)
            scale1 = tl.load(stats_ptr + 2 * C_MID + offs_k, mask=mask_k, other=0.0)
            w_ptrs = w_ptr + offs_k[:, None] * C_IN + offs_i[None, :]
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_i, other=0.0).to(tl.float32) * scale1[:, None]
            dx = tl.dot(dz, w.to(dz.dtype), dx, input_precision=PRECISION)
    else:
        dx += tl.load(t_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if dy_ptr is not None:
        dx += tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _sums_tile(x: Tensor, dz: Tensor) -> training_tiles.GradTile:
    return training_tiles.expand_sums_tile(x.shape[1], dz.shape[1], x.element_size(), common.limits(x.device))


def _input_grad_tile(dx: Tensor, dz: Tensor | None) -> training_tiles.GradTile:
    c_mid = 0 if dz is None else dz.shape[1]
    return training_tiles.input_grad_tile(dx.shape[1], c_mid, dx.element_size(), common.limits(dx.device))


def input_grad_launch(
    dx: Tensor,
    t: Tensor | None,
    dz: Tensor | None = None,
    weight: Tensor | None = None,
    stats: Tensor | None = None,
    x: Tensor | None = None,
    matrix: Tensor | None = None,
    scale: Tensor | None = None,
    vector: Tensor | None = None,
    dy: Tensor | None = None,
) -> Launch:
    """B3: ``dx [N, c_in, H, W]`` from T: ``t`` of its shape; or, where that is None, ``dz [N, c_mid, H, W]``.

    With ``dz`` go W1, ``weight [c_mid, c_in]`` in its type, and BN1's ``stats [4, c_mid]``: their product is rounded to
    that type.
    ``x``, like dx, ``matrix``, ``scale`` and ``vector``, of ``pull_back_launch``, are None where BN1 is frozen or
    missing, ``dy``, like dx, where the block isn't residual. A program owns BLOCK_M pixels and BLOCK_N channels.
    """
    assert (t is None) != (dz is None)
    N, c_in, H, W = dx.shape
    tile = _input_grad_tile(dx, dz)
    blocks_n = cdiv(c_in, tile.BLOCK_N)
    arguments = dict(
        t_ptr=t,
        dz_ptr=dz,
        w_ptr=None if dz is None else weight,
        stats_ptr=None if dz is None else stats,
        x_ptr=None if matrix is None else x,
        matrix_ptr=matrix,
        scale_ptr=scale,
        vector_ptr=vector,
        dy_ptr=dy,
        dx_ptr=dx,
        M=N * H * W,
        blocks_n=blocks_n,
        C_IN=c_in,
        C_MID=0 if dz is None else dz.shape[1],
        PRECISION=common.dot_precision(dx),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
    )
    grid = (cdiv(N * H * W, tile.BLOCK_M) * blocks_n,)
    steps = 1 if dz is None else cdiv(dz.shape[1], tile.BLOCK_K)
    return Launch(_input_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def input_grad_bytes(
    dx: Tensor,
    t: Tensor | None,
    dz: Tensor | None = None,
    weight: Tensor | None = None,
    stats: Tensor | None = None,
    x: Tensor | None = None,
    matrix: Tensor | None = None,
    scale: Tensor | None = None,
    vector: Tensor | None = None,
    dy: Tensor | None = None,
) -> Traffic:
    """Bytes of ``input_grad_launch``: dZ1 and X for each block of channels, what has no pixels for each of pixels."""
    tile = _input_grad_tile(dx, dz)
    blocks_m, blocks_n = cdiv(dx[:, 0].numel(), tile.BLOCK_M), cdiv(dx.shape[1], tile.BLOCK_N)
    traffic = Traffic(0, dx.nbytes, 0, dx.nbytes)
    for thin in (t, dy):
        if thin is not None:
            traffic += Traffic(thin.nbytes, 0, thin.nbytes, 0)
    if dz is not None and weight is not None and stats is not None:
        row = stats[0].nbytes
        loaded = dz.nbytes * blocks_n + weight.nbytes * blocks_m + row * blocks_m * blocks_n
        traffic += Traffic(dz.nbytes + weight.nbytes + row, 0, loaded, 0)
    if x is not None and matrix is not None and scale is not None and vector is not None:
        tiny = matrix.nbytes + scale.nbytes + vector.nbytes
        traffic += Traffic(x.nbytes + tiny, 0, x.nbytes * blocks_n + tiny * blocks_m, 0)
    return traffic
