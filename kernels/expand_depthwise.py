"""Pass P2 of the training block: from X to D, without the expanded tensor.

    E = X W1,   A = relu6(E scale1 + shift1),   D = depthwise3x3(A)

and the moments of D, by which BN2 normalises. Without an expansion A is X itself.

A program owns BLOCK_S strips (an image and COLUMNS output columns of it) by BLOCK_E channels, and walks down ROWS
output rows. It keeps three rows of A in registers (``register_tiles.py``), each a tuple of its own columns and of the
halo's: nothing is expanded twice but the halo, two columns a strip and two rows a walk.

ReLU6 is a clamp to [0, 1], which the hardware does inside the addition: A is held at a sixth, and the taps take the 6.
Zero padding applies to A: X is loaded as 0 outside the image and the shift is multiplied by 0 there. The clamp turns
NaN into 0; where statistics of the batch are NaN, as they are if X has one, D is made NaN.

Precision: X, W1 and D in one type, fp16, bf16 or fp32; all else in fp32. D is rounded once. The moments are those of D
before that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, tiles
from .common import Launch, Traffic, cdiv, covered, front_padding
from .partials import store_moments
from .register_tiles import (
    blocks,
    identity,
    joined,
    load_channels,
    load_exact,
    load_weight,
    parted,
    product,
    surplus_again,
)
from .tiles import ExpandTile


@dataclass(frozen=True)
class Walk:
    """What a program of the walk knows at compile time."""

    H: int
    W: int
    H_out: int
    W_out: int
    per_image: int  # strips side by side
    own: int  # columns of the input that belong to a strip
    halo: int  # columns beside them that it reads: left, right, or in this order both; none where the image fits
    stride: int
    pad_w: int
    c_in: int
    c_x: int  # channels of X
    expands: bool
    mask_e: bool  # whether the last block of channels isn't full
    check: bool  # whether some own column of X lies outside
    check_out: bool  # whether some own column of D lies outside
    block_s: int
    block_e: int
    block_k: int
    wide: int
    precision: str


@triton.constexpr_function
def walk_of(
    H: int,
    W: int,
    C_IN: int,
    C_MID: int,
    STRIDE: int,
    PAD_W: int,
    EXPANDS: bool,
    WHOLE: bool,
    PRECISION: str,
    BLOCK_S: int,
    BLOCK_E: int,
    BLOCK_K: int,
    COLUMNS: int,
    WIDE: int,
) -> Walk:
    """The walk over images of ``H x W`` pixels; WHOLE says that the strips fill every program."""
    H_out, W_out = -(-H // STRIDE), -(-W // STRIDE)
    per_image = -(-W_out // COLUMNS)
    own = COLUMNS * STRIDE
    return Walk(
        H=H,
        W=W,
        H_out=H_out,
        W_out=W_out,
        per_image=per_image,
        own=own,
        halo=0 if per_image == 1 and own >= W else 3 - STRIDE,
        stride=STRIDE,
        pad_w=PAD_W,
        c_in=C_IN,
        c_x=C_IN if EXPANDS else C_MID,
        expands=EXPANDS,
        mask_e=C_MID % BLOCK_E != 0,
        check=per_image * own != W or not WHOLE,
        check_out=per_image * COLUMNS != W_out or not WHOLE,
        block_s=BLOCK_S,
        block_e=BLOCK_E,
        block_k=BLOCK_K,
        wide=WIDE,
        precision=PRECISION,
    )


@triton.constexpr_function
def _column(c: int, g: Walk) -> int:
    """Where column c of a strip, from -1 to ``own``, is in the tuple of a row."""
    if 0 <= c < g.own:
        return c
    return g.own + 1 if c > 0 and g.halo == 2 else g.own


@triton.constexpr_function
def _exists(c: int, g: Walk) -> bool:
    """Whether column c of a strip can lie inside the image."""
    return g.halo > 0 or 0 <= c < g.W


@triton.jit
def strip_columns(first, strips, column, step, per_image: tl.constexpr, BLOCK_S: tl.constexpr):
    """Image, column of the image and whether it is there, of ``column`` (0 is a strip's first) of a program's strips.

    Pixels are in the order of the tiles: the program's BLOCK_S strips, column after column. Strips begin ``step``
    columns apart. Beyond the last strip it is the last strip again.
    """
    strip = first + tl.arange(0, column.shape[0]) % BLOCK_S
    there = tl.minimum(strip, strips - 1)
    return there // per_image, (there % per_image) * step + column, strip < strips


@triton.jit
def _activation(
    ptrs,
    columns,
    row,
    weights,
    scale,
    shift,
    offs_k,
    mask_e,
    g: tl.constexpr,
    n: tl.constexpr,
    CHECK: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):
    """A / 6 of n columns, 0 outside the image; A itself without an expansion, where the weights are the identity."""
    PIXELS: tl.constexpr = n * g.block_s
    if g.expands:
        a = product(weights, ptrs, columns & row, offs_k, g.c_in, g.block_k, g.block_e, PIXELS, CHECK, g.precision)
        shift = tl.broadcast_to(shift * row.to(tl.float32), a.shape)
        if CHECK_COLUMNS:
            shift = shift * columns.to(tl.float32)[None, :]
        a = tl.minimum(tl.maximum(tl.fma(a, tl.broadcast_to(scale, a.shape), shift), 0.0), 1.0)
    else:
        a = load_exact(weights[0], ptrs, mask_e, columns & row, g.mask_e, CHECK)
    return a


@triton.jit
def _row(
    ptrs,
    halo_ptrs,
    row,
    columns,
    halo,
    weights,
    scale,
    shift,
    offs_k,
    mask_e,
    g: tl.constexpr,
    CHECK_ROW: tl.constexpr,
):
    """A row of A as a tuple of tiles [block_e, block_s]: a strip's own columns, then those of the halo."""
    tiles = ()
    for b in tl.static_range(g.own // g.wide):
        a = _activation(
            ptrs + b * g.wide * g.c_x,
            columns[b],
            row,
            weights,
            scale,
            shift,
            offs_k,
            mask_e,
            g,
            g.wide,
            CHECK_ROW or g.check,
            g.check,
        )
        tiles = tiles + parted(a, g.wide, g.block_e, g.block_s)
    if g.halo > 0:
        a = _activation(halo_ptrs, halo, row, weights, scale, shift, offs_k, mask_e, g, g.halo, True, True)
        tiles = tiles + parted(a, g.halo, g.block_e, g.block_s)
    return tiles


@triton.jit
def _convolved(r0, r1, r2, taps, d, j: tl.constexpr, g: tl.constexpr):
    """``d`` and column j of the convolution of three rows."""
    for kx in tl.static_range(3):
        if _exists(j * g.stride + kx - g.pad_w, g):
            d = tl.fma(r0[_column(j * g.stride + kx - g.pad_w, g)], tl.broadcast_to(taps[kx], d.shape), d)
            d = tl.fma(r1[_column(j * g.stride + kx - g.pad_w, g)], tl.broadcast_to(taps[3 + kx], d.shape), d)
            d = tl.fma(r2[_column(j * g.stride + kx - g.pad_w, g)], tl.broadcast_to(taps[6 + kx], d.shape), d)
    return d


@triton.jit
def load_expansion(
    w1_ptr, stats_ptr, offs_e, mask_e, offs_k, dtype: tl.constexpr, g: tl.constexpr, C_MID: tl.constexpr
):
    """What makes A / 6 of X: W1 as tiles [block_e, block_k], scale and shift of BN1; the identity without expansion."""
    if g.expands:
        weights = load_weight(w1_ptr, offs_e, g.c_in, offs_k, 1, g.c_in, mask_e, blocks(g.c_in, g.block_k), g.block_k)
        scale = load_channels(stats_ptr + 2 * C_MID, offs_e, mask_e, g.mask_e) * (1 / 6)
        shift = load_channels(stats_ptr + 3 * C_MID, offs_e, mask_e, g.mask_e) * (1 / 6)
    else:
        weights = (identity(g.block_e, dtype),)
        scale = 0.0
        shift = 0.0
    return weights, scale, shift


@triton.jit
def load_taps(wd_ptr, offs_e, mask_e, factor: tl.constexpr, g: tl.constexpr):
    """The nine taps of Wd [C_MID, 9] as columns [block_e, 1]."""
    taps = ()
    for t in tl.static_range(9):
        taps = taps + (load_channels(wd_ptr + t, offs_e * 9, mask_e, g.mask_e) * factor,)
    return taps


@triton.jit
def _estimate(row, taps, g: tl.constexpr):
    """About what D will be, if the rows of A are like this one: numbers near their mean are summed with more digits."""
    d = tl.zeros(row[0].shape, tl.float32)
    for kx in tl.static_range(3):
        d = tl.fma(row[kx], tl.broadcast_to(taps[kx] + taps[3 + kx] + taps[6 + kx], d.shape), d)
    return d


@triton.jit(do_not_specialize=["strips", "chunks", "ROWS"])
def _expand_depthwise_kernel(
    x_ptr,
    w1_ptr,
    stats_ptr,
    wd_ptr,
    d_ptr,
    partials_ptr,
    strips,
    chunks,
    ROWS,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_OUT: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Row y of D comes from rows y STRIDE - PAD_H + {0, 1, 2} of A, of which the first is known from the last step.
    EXPANDS: tl.constexpr = w1_ptr is not None
    g: tl.constexpr = walk_of(
        H, W, C_IN, C_MID, STRIDE, PAD_W, EXPANDS, WHOLE, PRECISION, BLOCK_S, BLOCK_E, BLOCK_K, COLUMNS, WIDE
    )
    STEP: tl.constexpr = W * g.c_x
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    y0 = (pid % chunks) * ROWS  # neighbours in the grid share the halo's rows in L2
    y1 = tl.minimum(y0 + ROWS, g.H_out)
    first = (pid // chunks) * BLOCK_S
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < C_MID
    offs_k = tl.arange(0, BLOCK_K)
    offs_x = surplus_again(offs_k, C_IN, BLOCK_K) if EXPANDS else offs_e

    y_in = y0 * STRIDE + 1 - PAD_H  # the second of the three rows
    column = tl.arange(0, WIDE * BLOCK_S) // BLOCK_S
    n, x, there = strip_columns(first, strips, column, g.own, g.per_image, BLOCK_S)
    ptrs = x_ptr + ((n * H + y_in) * W + x).to(tl.int64)[None, :] * g.c_x + offs_x[:, None]
    columns = ()
    for b in tl.static_range(g.own // WIDE):
        columns = columns + (there & (x + b * WIDE < W),)
    column = tl.arange(0, (2 if g.halo == 2 else 1) * BLOCK_S) // BLOCK_S
    column = tl.where((column == 0) & (PAD_W == 1), -1, g.own)
    n, x, there = strip_columns(first, strips, column, g.own, g.per_image, BLOCK_S)
    halo_ptrs = x_ptr + ((n * H + y_in) * W + x).to(tl.int64)[None, :] * g.c_x + offs_x[:, None]
    halo = there & (x >= 0) & (x < W)
    column = tl.arange(0, WIDE_OUT * BLOCK_S) // BLOCK_S
    n, x_out, there = strip_columns(first, strips, column, COLUMNS, g.per_image, BLOCK_S)
    d_ptrs = d_ptr + ((n * g.H_out + y0) * g.W_out + x_out).to(tl.int64)[None, :] * C_MID + offs_e[:, None]

    weights, scale, shift = load_expansion(w1_ptr, stats_ptr, offs_e, mask_e, offs_k, dtype, g, C_MID)
    taps = load_taps(wd_ptr, offs_e, mask_e, 6.0 if EXPANDS else 1.0, g)
    strip = first + tl.arange(0, BLOCK_S)
    x_strip = strip % g.per_image * COLUMNS
    own_columns = tl.where(strip < strips, tl.minimum(g.W_out - x_strip, COLUMNS), 0)
    share = (1.0 / tl.maximum(own_columns, 1).to(tl.float32))[None, :]
    second = tl.zeros([BLOCK_E, BLOCK_S], tl.float32)

    yes = y0 >= 0
    above = yes if PAD_H == 0 else y0 > 0
    r0 = _row(ptrs - STEP, halo_ptrs - STEP, above, columns, halo, weights, scale, shift, offs_k, mask_e, g, PAD_H == 1)
    if STRIDE == 1:
        r1 = _row(ptrs, halo_ptrs, yes, columns, halo, weights, scale, shift, offs_k, mask_e, g, False)
    # Moments of each strip and channel, about a mean that follows: none is so far off that it costs digits.
    mean = _estimate(r1 if STRIDE == 1 else r0, taps, g)
    if EXPANDS:
        mean += tl.broadcast_to((scale + shift) * 0.0, mean.shape)  # NaN if they are, which the clamp of A would hide
    CHECK: tl.constexpr = (g.H_out - 1) * STRIDE + 2 - PAD_H >= H  # the third row may lie below the image
    for step in range(0, y1 - y0, UNROLL):
        for u in tl.static_range(UNROLL):
            if STRIDE == 1:
                middle = r1
            else:
                middle = _row(ptrs, halo_ptrs, yes, columns, halo, weights, scale, shift, offs_k, mask_e, g, False)
            below = (y0 + step + u) * STRIDE + 2 - PAD_H < H
            ptrs += STEP
            halo_ptrs += STEP
            r2 = _row(ptrs, halo_ptrs, below, columns, halo, weights, scale, shift, offs_k, mask_e, g, CHECK)
            if STRIDE == 2:
                ptrs += STEP
                halo_ptrs += STEP
            s1 = tl.zeros([BLOCK_E, BLOCK_S], tl.float32)
            for b in tl.static_range(COLUMNS // WIDE_OUT):
                row = ()
                for j in tl.static_range(WIDE_OUT):
                    d = _convolved(r0, middle, r2, taps, -mean, b * WIDE_OUT + j, g)
                    row = row + (d + mean,)
                    if partials_ptr is not None:
                        if g.check_out:
                            d = tl.where((b * WIDE_OUT + j < own_columns)[None, :], d, 0.0)
                        s1 += d
                        second = tl.fma(d, d, second)
                mask = (there & (x_out + b * WIDE_OUT < g.W_out))[None, :] & mask_e[:, None]
                tile = joined(row, WIDE_OUT, BLOCK_E, BLOCK_S).to(dtype)
                tl.store(d_ptrs + b * WIDE_OUT * C_MID, tile, mask=mask)
            if partials_ptr is not None:
                step_of_mean = s1 * (share * (1.0 / (step + u + 1)))
                second -= s1 * step_of_mean
                mean += step_of_mean
            d_ptrs += g.W_out * C_MID
            if STRIDE == 1:
                r0 = middle
                r1 = r2
            else:
                r0 = r2
    if partials_ptr is not None:
        counts = (own_columns * (y1 - y0)).to(tl.float32)
        count = tl.sum(counts)
        middle_of_all = tl.sum(mean * counts[None, :], axis=1) / count
        off = mean - middle_of_all[:, None]
        second = tl.sum(second + off * off * counts[None, :], axis=1)
        store_moments(partials_ptr, pid, count, middle_of_all, second, offs_e, mask_e, C_MID)


def expand_depthwise_launch(
    x: Tensor,
    w1: Tensor | None,
    stats1: Tensor | None,
    wd: Tensor,
    d: Tensor,
    stride: int,
    padding: str,
    *,
    moments: bool,
    tile: ExpandTile | None = None,
) -> Launch:
    """Make ``d [N, c_mid, H_out, W_out]`` of ``x [N, c_in, H, W]``.

    ``w1 [c_mid, c_in]`` in x's type and ``stats1 [4, c_mid]`` of BN1 are None without an expansion; ``wd`` is
    ``[c_mid, 1, 3, 3]``.
    With ``moments`` the launch's argument ``partials_ptr [P, 1 + 2 c_mid]`` takes the moments of D. ``tile`` replaces
    the choice.
    """
    N, _, H, W = x.shape
    c_mid, H_out, W_out = d.shape[1:]
    tile = (tile or tiles.expand_tile(c_mid, stride, W_out, x.element_size())).fitted(H_out)
    strips, blocks_e = N * cdiv(W_out, tile.COLUMNS), cdiv(c_mid, tile.BLOCK_E)
    groups = cdiv(strips, tile.BLOCK_S)
    ROWS = tiles.walk_rows(H_out, groups * blocks_e, tile, common.limits(x.device).processors)
    programs = groups * cdiv(H_out, ROWS)
    arguments = dict(
        x_ptr=x,
        w1_ptr=w1,
        stats_ptr=stats1,
        wd_ptr=wd,
        d_ptr=d,
        partials_ptr=common.allocate((programs, 1 + 2 * c_mid), x, torch.float32) if moments else None,
        strips=strips,
        chunks=cdiv(H_out, ROWS),
        ROWS=ROWS,
        H=H,
        W=W,
        C_IN=x.shape[1],
        C_MID=c_mid,
        STRIDE=stride,
        PAD_H=front_padding(H, stride, padding),
        PAD_W=front_padding(W, stride, padding),
        WHOLE=strips % tile.BLOCK_S == 0,
        PRECISION=common.dot_precision(x),
        BLOCK_S=tile.BLOCK_S,
        BLOCK_E=tile.BLOCK_E,
        BLOCK_K=tiles.block_k(x.shape[1]),
        COLUMNS=tile.COLUMNS,
        WIDE=tile.WIDE,
        WIDE_OUT=tile.WIDE_OUT,
        UNROLL=tile.UNROLL,
    )
    trips = ROWS // tile.UNROLL
    grid = (programs, blocks_e)
    return Launch(_expand_depthwise_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, trips)


def operand_bytes(C: int, BLOCK: int, element_size: int) -> int:
    """Bytes that a product requests of a pixel's C channels, surplus included."""
    return (BLOCK if C < BLOCK and C % 8 == 0 else C) * element_size


def expand_depthwise_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``expand_depthwise_launch``: each block of channels reads X, with the halo of strips and walks."""
    launch = expand_depthwise_launch(*arguments, **keywords)
    at, (programs, blocks_e) = launch.arguments, launch.grid
    x, d, H, W, stride = at["x_ptr"], at["d_ptr"], at["H"], at["W"], at["STRIDE"]
    H_out = d.shape[2]
    g = walk_of(
        *(at[name] for name in ("H", "W", "C_IN", "C_MID", "STRIDE", "PAD_W")),
        at["w1_ptr"] is not None,
        *(at[name] for name in ("WHOLE", "PRECISION", "BLOCK_S", "BLOCK_E", "BLOCK_K", "COLUMNS", "WIDE")),
    )
    top, left = -at["PAD_H"], -at["PAD_W"] if g.halo else 0
    end = min(H, top + (H_out - 1) * stride + 3)
    rows = covered(range(top, top + H_out * stride, at["ROWS"] * stride), (at["ROWS"] - 1) * stride + 3, end)
    columns = covered(range(left, left + g.per_image * g.own, g.own), g.own + g.halo, W)
    pixel = operand_bytes(g.c_in, g.block_k, x.element_size()) * blocks_e if g.expands else g.c_x * x.element_size()
    names = ("w1_ptr", "wd_ptr")
    small = sum(at[name].nbytes for name in names if at[name] is not None) + g.expands * 2 * at["C_MID"] * 4
    written = d.nbytes + (0 if at["partials_ptr"] is None else at["partials_ptr"].nbytes)
    return Traffic(x.nbytes + small, written, x.shape[0] * rows * columns * pixel + programs * small, written)
