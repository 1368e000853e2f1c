"""Passes P3 and B1 of the training block: the projection of D, and its backward.

    B = relu6(D scale2 + shift2),   P = B W2,   and the moments of P, by which BN3 normalises

    Z2 = D scale2 + shift2,   dZ2 = (dP W2^T) [0 < Z2 < 6],   dbeta2 = sum dZ2,   dgamma2 = sum dZ2 (D - mean2) rstd2
    dW2 = B^T dP

Each is one pass over D, the one tensor of c_mid channels that is stored. B is made as D is loaded and never stored.
What BN2's backward needs next, dD, isn't either: it is made again where it is used (``expand_depthwise_grads.py``).

Precision: D, P, dP and W2 in one type; B is rounded once, as a factor; all sums in fp32. Both hold B at a sixth, as a
clamp to [0, 1], which turns NaN into 0; where statistics are NaN, P3 makes P NaN. The moments are those of P as it is
stored. A program's are merged tile by tile, each about its own mean (Chan et al. 1983): a large mean costs no digits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, tiles, training_tiles
from .common import Launch, Traffic, cdiv
from .partials import store_moments
from .register_tiles import (
    blocks,
    identity,
    load_channels,
    load_exact,
    load_masked,
    load_weight,
    needs_mask,
    operand_bytes,
    product,
    surplus_again,
    zeros,
)
from .tiles import ProjectTile
from .training_tiles import ProjectGradTile


@triton.jit
def _about_mean(p, inside, n):
    """Mean of the n rows of ``p`` that are inside, and their sum of squares about it; of no rows, 0."""
    mean = tl.sum(tl.where(inside[:, None], p, 0.0), axis=0) / tl.maximum(n, 1.0)
    off = tl.where(inside[:, None], p - mean[None, :], 0.0)
    return mean, tl.sum(off * off, axis=0)


@triton.jit(do_not_specialize=["M", "TILES"])
def _project_kernel(
    d_ptr,
    stats_ptr,
    w2_ptr,
    p_ptr,
    partials_ptr,
    M,
    TILES,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns TILES times BLOCK_M pixels and all channels of P, in pieces of BLOCK_O: so D is read once.
    OC: tl.constexpr = blocks(C_OUT, BLOCK_O)
    pid = tl.program_id(0)
    offs_o = tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = d_ptr.dtype.element_ty
    count = 0.0
    means = ()
    seconds = ()
    for _ in tl.static_range(OC):
        means = means + (tl.zeros([BLOCK_O], tl.float32),)
        seconds = seconds + (tl.zeros([BLOCK_O], tl.float32),)
    # NaN if a number of the statistics is none, else 0: the clamp of B would hide it.
    spoilt = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, C_MID, BLOCK_K):
        mask = k + offs_k < C_MID
        scale = tl.load(stats_ptr + 2 * C_MID + k + offs_k, mask=mask, other=0.0)
        spoilt += (scale + tl.load(stats_ptr + 3 * C_MID + k + offs_k, mask=mask, other=0.0)) * 0.0
    spoilt = tl.sum(spoilt, axis=0)
    for tile in range(0, TILES):
        pixel = (pid * TILES + tile).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = pixel < M
        p = zeros(OC, BLOCK_M, BLOCK_O)
        for k in range(0, C_MID, BLOCK_K):
            e = k + offs_k
            mask_e = e < C_MID
            d = tl.load(d_ptr + pixel[:, None] * C_MID + e[None, :], mask=inside[:, None] & mask_e[None, :], other=0.0)
            scale = tl.load(stats_ptr + 2 * C_MID + e, mask=mask_e, other=0.0)
            shift = tl.load(stats_ptr + 3 * C_MID + e, mask=mask_e, other=0.0)
            b = d.to(tl.float32) * (scale * (1 / 6))[None, :] + (shift * (1 / 6))[None, :]
            b = tl.minimum(tl.maximum(b, 0.0), 1.0).to(dtype)
            sums = ()
            for i in tl.static_range(OC):
                o = i * BLOCK_O + offs_o
                mask = (o < C_OUT)[None, :] & mask_e[:, None]
                w = tl.load(w2_ptr + o[None, :] * C_MID + e[:, None], mask=mask, other=0.0)
                sums = sums + (tl.dot(b, w, p[i], input_precision=PRECISION),)
            p = sums
        here = tl.sum(inside.to(tl.float32))
        share = here / tl.maximum(count + here, 1.0)
        moved = ()
        spread = ()
        for i in tl.static_range(OC):
            o = i * BLOCK_O + offs_o
            out = (p[i] * 6.0 + spoilt).to(dtype)
            ptrs = p_ptr + pixel[:, None] * C_OUT + o[None, :]
            tl.store(ptrs, out, mask=inside[:, None] & (o < C_OUT)[None, :])
            if partials_ptr is not None:
                mean, off = _about_mean(out.to(tl.float32), inside, here)
                delta = mean - means[i]
                spread = spread + (seconds[i] + off + delta * delta * (count * share),)
                moved = moved + (means[i] + delta * share,)
        if partials_ptr is not None:
            means = moved
            seconds = spread
            count += here
    if partials_ptr is not None:
        for i in tl.static_range(OC):
            o = i * BLOCK_O + offs_o
            store_moments(partials_ptr, pid, count, means[i], seconds[i], o, o < C_OUT, C_OUT)


@triton.jit(do_not_specialize=["M", "TILES"])
def _project_grads_kernel(
    d_ptr,
    dp_ptr,
    w2_ptr,
    stats_ptr,
    sums_ptr,
    dw_ptr,
    M,
    TILES,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # A program owns TILES times BLOCK_M pixels and BLOCK_E channels of D; WHOLE says that pixels fill every program.
    OC: tl.constexpr = blocks(C_OUT, BLOCK_O)
    MASK_E: tl.constexpr = C_MID % BLOCK_E != 0
    dtype: tl.constexpr = d_ptr.dtype.element_ty
    pid = tl.program_id(0)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < C_MID
    offs_o = tl.arange(0, BLOCK_O)
    offs_y = surplus_again(offs_o, C_OUT, BLOCK_O)
    w2 = load_weight(w2_ptr, offs_e, 1, offs_o, C_MID, C_OUT, mask_e, MASK_E, OC, BLOCK_O)
    mean = load_channels(stats_ptr, offs_e, mask_e, MASK_E)
    scale = load_channels(stats_ptr + 2 * C_MID, offs_e, mask_e, MASK_E)
    shift = (load_channels(stats_ptr + 3 * C_MID, offs_e, mask_e, MASK_E) + mean * scale) * (1 / 6)  # beta2 / 6
    scale = scale * (1 / 6)
    eye = identity(BLOCK_E, dtype)
    s1 = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    s2 = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    dw = zeros(OC, BLOCK_E, BLOCK_O)
    offs_m = (pid * TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d_ptrs = d_ptr + offs_m[None, :] * C_MID + offs_e[:, None]
    dp_ptrs = dp_ptr + offs_m[None, :] * C_OUT + offs_y[:, None]
    again_ptrs = dp_ptr + offs_m[:, None] * C_OUT + offs_y[None, :]
    for tile in range(0, TILES):
        inside = offs_m + tile * BLOCK_M < M
        db = product(w2, dp_ptrs, inside, offs_o, C_OUT, BLOCK_O, BLOCK_E, BLOCK_M, not WHOLE, PRECISION)
        d = load_exact(eye, d_ptrs, mask_e, inside, MASK_E, not WHOLE) - mean
        b = tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(shift, d.shape))
        b = tl.minimum(tl.maximum(b, 0.0), 1.0)
        dz = db * (tl.abs(b - 0.5) < 0.5).to(tl.float32)
        s1 += dz
        s2 = tl.fma(dz, d, s2)
        sums = ()
        for k in tl.static_range(OC):
            # dP once more, in the other layout: cheaper than shuffling what the first product read.
            dp = load_masked(
                again_ptrs + k * BLOCK_O,
                inside,
                k * BLOCK_O + offs_o < C_OUT,
                not WHOLE,
                needs_mask(k, C_OUT, BLOCK_O),
            )
            sums = sums + (tl.dot(b.to(dtype), dp, dw[k], input_precision=PRECISION),)
        dw = sums
        d_ptrs += BLOCK_M * C_MID
        dp_ptrs += BLOCK_M * C_OUT
        again_ptrs += BLOCK_M * C_OUT
    record = sums_ptr + pid.to(tl.int64) * 2 * C_MID + offs_e
    tl.store(record, tl.sum(s1, axis=1), mask=mask_e)
    tl.store(record + C_MID, tl.sum(s2, axis=1), mask=mask_e)
    for k in tl.static_range(OC):
        offs = k * BLOCK_O + offs_o
        dw_ptrs = dw_ptr + (pid.to(tl.int64) * C_MID + offs_e[:, None]) * C_OUT + offs[None, :]
        tl.store(dw_ptrs, dw[k] * 6.0, mask=mask_e[:, None] & (offs < C_OUT)[None, :])


def project_launch(
    d: Tensor,
    stats: Tensor,
    w2: Tensor,
    p: Tensor,
    *,
    moments: bool,
    tile: ProjectTile | None = None,
) -> Launch:
    """Make ``p [N, c_out, H, W]`` of ``d [N, c_mid, H, W]``, with BN2's ``stats [4, c_mid]`` and ``w2 [c_out, c_mid]``.

    W2 has d's type.
    With ``moments`` the launch's argument ``partials_ptr [P, 1 + 2 c_out]`` takes the moments of P.
    """
    N, c_mid, H, W = d.shape
    M, c_out = N * H * W, p.shape[1]
    limits = common.limits(d.device)
    tile = tile or training_tiles.project_tile(c_mid, c_out, d.element_size(), limits)
    TILES = training_tiles.pixel_tiles(cdiv(M, tile.BLOCK_M), 1, tile.num_warps, limits.processors)
    programs = cdiv(cdiv(M, tile.BLOCK_M), TILES)
    arguments = dict(
        d_ptr=d,
        stats_ptr=stats,
        w2_ptr=w2,
        p_ptr=p,
        partials_ptr=common.allocate((programs, 1 + 2 * c_out), d, torch.float32) if moments else None,
        M=M,
        TILES=TILES,
        C_MID=c_mid,
        C_OUT=c_out,
        PRECISION=common.dot_precision(d),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_O=tile.BLOCK_O,
        BLOCK_K=tile.BLOCK_K,
    )
    trips = cdiv(c_mid, tile.BLOCK_K)
    return Launch(_project_kernel, (programs,), arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, trips)


def project_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``project_launch``: D once, weights and statistics for each tile of pixels, statistics once more."""
    launch = project_launch(*arguments, **keywords)
    at = launch.arguments
    d, w2, c_mid = at["d_ptr"], at["w2_ptr"], at["C_MID"]
    written = at["p_ptr"].nbytes + (0 if at["partials_ptr"] is None else at["partials_ptr"].nbytes)
    vectors = 2 * c_mid * 4
    loaded = d.nbytes + launch.grid[0] * (at["TILES"] * (w2.nbytes + vectors) + vectors)
    return Traffic(d.nbytes + w2.nbytes + vectors, written, loaded, written)


def project_grads_launch(
    d: Tensor, dp: Tensor, w2: Tensor, stats: Tensor, *, tile: ProjectGradTile | None = None
) -> Launch:
    """From ``dp [N, c_out, H, W]`` and ``d [N, c_mid, H, W]``, and ``w2 [c_out, c_mid]``, ``stats [4, c_mid]`` of BN2.

    W2 has d's type.
    The launch's arguments take fp32 partials: ``sums_ptr [P, 2, c_mid]`` of dZ2 and of dZ2 (D - mean2), and
    ``dw_ptr [P, c_mid, c_out]`` of dW2.
    """
    N, c_mid, H, W = d.shape
    M, c_out = N * H * W, dp.shape[1]
    limits = common.limits(d.device)
    tile = tile or training_tiles.project_grad_tile(c_mid, c_out, d.element_size(), limits)
    blocks_e = cdiv(c_mid, tile.BLOCK_E)
    TILES = training_tiles.pixel_tiles(
        cdiv(M, tile.BLOCK_M),
        blocks_e,
        tile.num_warps,
        limits.processors,
        most=d.nbytes // (32 * 4 * c_mid * c_out),  # writing and reading dW2's partials is a sixteenth of D at most
    )
    programs = cdiv(cdiv(M, tile.BLOCK_M), TILES)
    arguments = dict(
        d_ptr=d,
        dp_ptr=dp,
        w2_ptr=w2,
        stats_ptr=stats,
        sums_ptr=common.allocate((programs, 2, c_mid), d, torch.float32),
        dw_ptr=common.allocate((programs, c_mid, c_out), d, torch.float32),
        M=M,
        TILES=TILES,
        C_MID=c_mid,
        C_OUT=c_out,
        WHOLE=M % (tile.BLOCK_M * TILES) == 0,
        PRECISION=common.dot_precision(d),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_E=tile.BLOCK_E,
        BLOCK_O=tiles.block_k(c_out),
    )
    grid = (programs, blocks_e)
    return Launch(_project_grads_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, TILES)


def project_grads_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``project_grads_launch``: each block of channels reads dP twice and its own part of D once."""
    launch = project_grads_launch(*arguments, **keywords)
    at, (programs, blocks_e) = launch.arguments, launch.grid
    d, dp, w2, size = at["d_ptr"], at["dp_ptr"], at["w2_ptr"], at["d_ptr"].element_size()
    written = at["sums_ptr"].nbytes + at["dw_ptr"].nbytes
    small = w2.nbytes + 3 * at["C_MID"] * 4
    pixels = dp.numel() // at["C_OUT"]
    twice = 2 * pixels * operand_bytes(at["C_OUT"], at["BLOCK_O"], size) * blocks_e
    return Traffic(d.nbytes + dp.nbytes + small, written, d.nbytes + twice + programs * small, written)
