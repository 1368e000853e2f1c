"""BatchNorm 3 of the training block, the passes over thin tensors: P4 forward, B0 and dP backward.

    P4   Y  = P scale + shift (+ X)
    B0   sum dY  and  sum dY (P - mean), a channel: dbeta3 and, times rstd, dgamma3
         dP = ca dY + cb P + cc

All are bound by memory: every tensor is read or written once. A program owns BLOCK_M pixels by BLOCK_C channels, and
for the sums of B0 walks over several of these tiles.

Precision: X, P, Y, dY, dP in fp16, bf16 or fp32; statistics, coefficients and sums in fp32. B0 leaves one fp32 partial
a program, to be merged in a fixed order in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv


@triton.jit
def _owned(pixel_block, channel_block, M, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a tile of a tensor ``[M, C]`` (64-bit), their mask, the channels, and their mask."""
    offs_m = pixel_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    return offs_m[:, None] * C + offs_c[None, :], (offs_m < M)[:, None] & mask_c[None, :], offs_c, mask_c


@triton.jit(do_not_specialize=["M", "blocks_c"])
def _apply_kernel(
    p_ptr, stats_ptr, x_ptr, y_ptr, M, blocks_c, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    pid = tl.program_id(0)
    offs, mask, offs_c, mask_c = _owned(pid // blocks_c, pid % blocks_c, M, C, BLOCK_M, BLOCK_C)
    scale = tl.load(stats_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(stats_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    y = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if x_ptr is not None:
        y += tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "STEPS"])
def _sums_kernel(
    dy_ptr, p_ptr, stats_ptr, partials_ptr, M, STEPS, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    # A program owns BLOCK_C channels and STEPS blocks of pixels, of which the last program's may lie outside.
    pid = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(stats_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for step in range(STEPS):
        offs, mask, _, _ = _owned(pid * STEPS + step, tl.program_id(1), M, C, BLOCK_M, BLOCK_C)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += dy
        centred += dy * (p - mean)
    out = partials_ptr + pid.to(tl.int64) * 2 * C + offs_c
    tl.store(out, tl.sum(total, axis=0), mask=offs_c < C)
    tl.store(out + C, tl.sum(centred, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=["M", "blocks_c"])
def _projected_grad_kernel(
    dy_ptr, p_ptr, coefs_ptr, dp_ptr, M, blocks_c, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    pid = tl.program_id(0)
    offs, mask, offs_c, mask_c = _owned(pid // blocks_c, pid % blocks_c, M, C, BLOCK_M, BLOCK_C)
    ca = tl.load(coefs_ptr + offs_c, mask=mask_c, other=0.0)[None, :]
    cb = tl.load(coefs_ptr + C + offs_c, mask=mask_c, other=0.0)[None, :]
    cc = tl.load(coefs_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)[None, :]
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dp_ptr + offs, (ca * dy + (cb * p + cc)).to(dp_ptr.dtype.element_ty), mask=mask)


def _elementwise(p: Tensor) -> tuple[tuple[int, ...], dict[str, int], int]:
    """Grid, sizes by name and warps of a launch whose programs own one tile of ``p [N, C, H, W]`` each.

    Programs of the same pixels are neighbours in the grid: together they read whole lines of memory.
    """
    N, C, H, W = p.shape
    tile = training_tiles.thin_tile(C)
    blocks_c = cdiv(C, tile.BLOCK_C)
    sizes = dict(M=N * H * W, blocks_c=blocks_c, C=C, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C)
    return (cdiv(N * H * W, tile.BLOCK_M) * blocks_c,), sizes, tile.num_warps


def apply_launch(p: Tensor, stats: Tensor, residual: Tensor | None, y: Tensor) -> Launch:
    """P4: normalise ``p [N, C, H, W]`` by ``stats [4, C]`` (fp32), add ``residual``, into ``y``, all of p's shape.

    A program owns BLOCK_M pixels by BLOCK_C channels.
    """
    grid, sizes, num_warps = _elementwise(p)
    return Launch(_apply_kernel, grid, dict(p_ptr=p, stats_ptr=stats, x_ptr=residual, y_ptr=y, **sizes), num_warps)


def apply_bytes(p: Tensor, stats: Tensor, residual: Tensor | None, y: Tensor) -> Traffic:
    """Bytes of ``apply_launch``: each tensor once, and for each block of pixels scale and shift."""
    thin, vectors = p.nbytes + (0 if residual is None else residual.nbytes), 2 * stats[0].nbytes
    pixel_blocks = cdiv(p[:, 0].numel(), training_tiles.thin_tile(p.shape[1]).BLOCK_M)
    return Traffic(thin + vectors, y.nbytes, thin + pixel_blocks * vectors, y.nbytes)


def _sums_steps(p: Tensor) -> int:
    """Blocks of pixels that a program of ``sums_launch`` walks over."""
    N, C, H, W = p.shape
    tile = training_tiles.thin_tile(C)
    wanted = max(1, training_tiles.SUMS_PROGRAMS * common.limits(p.device).processors // cdiv(C, tile.BLOCK_C))
    return max(training_tiles.SUMS_MIN_STEPS, cdiv(cdiv(N * H * W, tile.BLOCK_M), wanted))


def sums_programs(p: Tensor) -> int:
    """Partials that ``sums_launch`` leaves for ``p [N, C, H, W]``."""
    return cdiv(p[:, 0].numel(), training_tiles.thin_tile(p.shape[1]).BLOCK_M * _sums_steps(p))


def sums_launch(dy: Tensor, p: Tensor, stats: Tensor, partials: Tensor) -> Launch:
    """B0: sums of ``dy [N, C, H, W]`` and of dy (p - mean) into ``partials [sums_programs(p), 2, C]`` (fp32).

    The means are the first row of ``stats [4, C]`` (fp32). A program owns BLOCK_C channels and so many blocks of
    BLOCK_M pixels that the programs are few.
    """
    N, C, H, W = p.shape
    tile = training_tiles.thin_tile(C)
    sizes = dict(M=N * H * W, STEPS=_sums_steps(p), C=C, BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C)
    arguments = dict(dy_ptr=dy, p_ptr=p, stats_ptr=stats, partials_ptr=partials, **sizes)
    grid = (sums_programs(p), cdiv(C, tile.BLOCK_C))
    return Launch(_sums_kernel, grid, arguments, tile.num_warps, trips=sizes["STEPS"])


def sums_bytes(dy: Tensor, p: Tensor, stats: Tensor, partials: Tensor) -> Traffic:
    """Bytes of ``sums_launch``: each tensor once, and for each partial the means."""
    thin, means = dy.nbytes + p.nbytes, stats[0].nbytes
    return Traffic(thin + means, partials.nbytes, thin + sums_programs(p) * means, partials.nbytes)


def projected_grad_launch(dy: Tensor, p: Tensor, coefs: Tensor, dp: Tensor) -> Launch:
    """Gradient of ``p [N, C, H, W]`` from that of its norm, ``dy``, by ``coefs [3, C]`` (fp32), into ``dp``.

    Of a frozen norm, whose cb and cc are 0, P is read all the same. A program owns BLOCK_M pixels by BLOCK_C channels.
    """
    grid, sizes, num_warps = _elementwise(p)
    arguments = dict(dy_ptr=dy, p_ptr=p, coefs_ptr=coefs, dp_ptr=dp, **sizes)
    return Launch(_projected_grad_kernel, grid, arguments, num_warps)


def projected_grad_bytes(dy: Tensor, p: Tensor, coefs: Tensor, dp: Tensor) -> Traffic:
    """Bytes of ``projected_grad_launch``: each tensor once, and for each block of pixels the coefficients."""
    thin = dy.nbytes + p.nbytes
    pixel_blocks = cdiv(p[:, 0].numel(), training_tiles.thin_tile(p.shape[1]).BLOCK_M)
    return Traffic(thin + coefs.nbytes, dp.nbytes, thin + pixel_blocks * coefs.nbytes, dp.nbytes)
