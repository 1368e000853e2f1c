"""Pass P2 of the training block: from X to D, without the expanded tensor.

    E = X W1,   A = relu6(E scale1 + shift1),   D = depthwise3x3(A)

and the moments of D, by which BN2 normalises. Without an expansion A is X itself.

A program owns BLOCK_S strips (an image and COLUMNS output columns of it) by BLOCK_E channels, and walks down ROWS
output rows. It keeps three rows of A in registers (``register_tiles.py``), each a tuple of its own columns and of the
halo's: nothing is expanded twice but the halo, two columns a strip and two rows a walk.

ReLU6 is a clamp to [0, 1], which the hardware does inside the addition: A is held at a sixth, and the taps take the 6.
Zero padding applies to A: X is loaded as 0 outside the image and the shift is multiplied by 0 there. The clamp turns
NaN into 0; where statistics are NaN, as those of a batch are if X has one, D is made NaN.

Precision: X, W1 and D in one type, fp16, bf16 or fp32; all else in fp32. D is rounded once. The moments are those of D
before that rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv, covered
from .partials import store_moments
from .register_tiles import joined, operand_bytes, parted, store_masked, surplus_again, zeros
from .training_tiles import WalkTile
from .walks import Walk, activation, load_expansion, load_taps, strip_columns, walk_of


@triton.constexpr_function
def _column(c: int, walk: Walk) -> int:
    """Where column c of a strip, from -1 to ``own``, is in the tuple of a row: of the halo left comes first."""
    if 0 <= c < walk.own:
        return c
    return walk.own + 1 if c > 0 and walk.halo == 2 else walk.own


@triton.constexpr_function
def _exists(c: int, walk: Walk) -> bool:
    """Whether column c of a strip can lie inside the image."""
    return walk.halo > 0 or 0 <= c < walk.W


@triton.constexpr_function
def _outside(first: int, n: int, walk: Walk) -> bool:
    """Whether some of n columns of D from a strip's ``first`` on can lie outside the image."""
    return not walk.whole or first + n > walk.W_out - (walk.per_image - 1) * walk.COLUMNS


@triton.jit
def _activated_row(ptrs, row, inside, expansion, walk: tl.constexpr, CHECK_ROW: tl.constexpr):
    """A row of A as a tuple of tiles [BLOCK_E, BLOCK_S]: a strip's own columns, then those of the halo.

    ``ptrs`` are those of the first WIDE columns and of the halo, ``inside`` says of all what lies in the image, ``row``
    of the row.
    """
    own_ptrs, halo_ptrs = ptrs
    columns, halo = inside
    CHECK: tl.constexpr = CHECK_ROW or walk.check
    tiles = ()
    for b in tl.static_range(walk.own // walk.WIDE):
        at = own_ptrs + b * walk.WIDE * walk.c_x
        a = activation(at, columns[b] & row, columns[b], row, expansion, walk, walk.WIDE, CHECK, walk.check)
        tiles = tiles + parted(a, walk.WIDE, walk.BLOCK_E, walk.BLOCK_S)
    if walk.halo > 0:
        a = activation(halo_ptrs, halo & row, halo, row, expansion, walk, walk.halo, True, True)
        tiles = tiles + parted(a, walk.halo, walk.BLOCK_E, walk.BLOCK_S)
    return tiles


@triton.jit
def _convolved(rows, taps, d, j: tl.constexpr, walk: tl.constexpr):
    """``d`` and column j of the convolution of three rows."""
    for kx in tl.static_range(3):
        if _exists(j * walk.stride + kx - walk.pad_w, walk):
            for ky in tl.static_range(3):
                a = rows[ky][_column(j * walk.stride + kx - walk.pad_w, walk)]
                d = tl.fma(a, tl.broadcast_to(taps[3 * ky + kx], d.shape), d)
    return d


@triton.jit
def _addresses(x_ptr, offs_x, first, strips, y_in, walk: tl.constexpr):
    """Pointers and masks for ``_activated_row``, of row ``y_in`` of X."""
    column = tl.arange(0, walk.WIDE * walk.BLOCK_S) // walk.BLOCK_S
    n, x, there = strip_columns(first, strips, column, walk.own, walk)
    own_ptrs = x_ptr + ((n * walk.H + y_in) * walk.W + x).to(tl.int64)[None, :] * walk.c_x + offs_x[:, None]
    columns = ()
    for b in tl.static_range(walk.own // walk.WIDE):
        columns = columns + (there & (x + b * walk.WIDE < walk.W),)
    column = tl.arange(0, (2 if walk.halo == 2 else 1) * walk.BLOCK_S) // walk.BLOCK_S
    column = tl.where((column == 0) & (walk.pad_w == 1), -1, walk.own)
    n, x, there = strip_columns(first, strips, column, walk.own, walk)
    halo_ptrs = x_ptr + ((n * walk.H + y_in) * walk.W + x).to(tl.int64)[None, :] * walk.c_x + offs_x[:, None]
    return (own_ptrs, halo_ptrs), (columns, there & (x >= 0) & (x < walk.W))


@triton.jit
def _below(ptrs, rows: tl.constexpr, walk: tl.constexpr):
    """``ptrs`` so many rows of X further down."""
    return ptrs[0] + rows * walk.W * walk.c_x, ptrs[1] + rows * walk.W * walk.c_x


@triton.jit
def _store_row(
    rows,
    taps,
    mean,
    s1,
    second,
    begins,
    d_ptrs,
    inside,
    own_columns,
    mask_e,
    walk: tl.constexpr,
    MOMENTS: tl.constexpr,
    MAY_BEGIN: tl.constexpr,
):
    """Store a row of D, and add its numbers and their squares, less the mean, to ``s1`` and ``second``.

    The mean is the first number itself where the walk ``begins``. Returned are the mean and both sums.
    """
    there, x = inside
    WIDE_OUT: tl.constexpr = walk.WIDE_OUT
    for b in tl.static_range(walk.COLUMNS // WIDE_OUT):
        row = ()
        for j in tl.static_range(WIDE_OUT):
            d = _convolved(rows, taps, -mean if MOMENTS else mean, b * WIDE_OUT + j, walk)
            if MOMENTS:
                if MAY_BEGIN and b + j == 0:
                    mean = tl.where(begins, d, mean)
                    d = tl.where(begins, 0.0, d)
                row = row + (d + mean,)
                if _outside(b * WIDE_OUT + j, 1, walk):
                    d = tl.where((b * WIDE_OUT + j < own_columns)[None, :], d, 0.0)
                s1 += d
                second = tl.fma(d, d, second)
            else:
                row = row + (d,)
        tile = joined(row, WIDE_OUT, walk.BLOCK_E, walk.BLOCK_S).to(d_ptrs.dtype.element_ty)
        ptrs = d_ptrs + b * WIDE_OUT * walk.c_mid
        store_masked(
            ptrs,
            tile,
            mask_e,
            there & (x + b * WIDE_OUT < walk.W_out),
            walk.mask_e,
            _outside(b * WIDE_OUT, WIDE_OUT, walk),
        )
    return mean, s1, second


@triton.jit
def _store_strip_moments(partials_ptr, program, counts, mean, second, offs_e, mask_e, c_mid: tl.constexpr):
    """The program's record of moments from those of its strips, which have ``counts`` numbers of each channel."""
    count = tl.sum(counts)
    mean_of_all = tl.sum(mean * counts[None, :], axis=1) / count
    off = mean - mean_of_all[:, None]
    second = tl.sum(second + off * off * counts[None, :], axis=1)
    store_moments(partials_ptr, program, count, mean_of_all, second, offs_e, mask_e, c_mid)


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
    walk: tl.constexpr,
):
    # Row y of D comes from rows y stride - pad_h + {0, 1, 2} of A, of which the first is known from the last step.
    UNROLL: tl.constexpr = walk.UNROLL
    pid = tl.program_id(0)
    y0 = (pid % chunks) * ROWS  # neighbours in the grid share the halo's rows in L2
    y1 = tl.minimum(y0 + ROWS, walk.H_out)
    first = (pid // chunks) * walk.BLOCK_S
    offs_e = tl.program_id(1) * walk.BLOCK_E + tl.arange(0, walk.BLOCK_E)
    mask_e = offs_e < walk.c_mid
    offs_k = tl.arange(0, walk.BLOCK_K)
    offs_x = surplus_again(offs_k, walk.c_in, walk.BLOCK_K) if walk.expands else offs_e
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    ptrs, inside = _addresses(x_ptr, offs_x, first, strips, y0 * walk.stride + 1 - walk.pad_h, walk)
    column = tl.arange(0, walk.WIDE_OUT * walk.BLOCK_S) // walk.BLOCK_S
    n, x_out, there = strip_columns(first, strips, column, walk.COLUMNS, walk)
    pixel = ((n * walk.H_out + y0) * walk.W_out + x_out).to(tl.int64)
    d_ptrs, inside_d = d_ptr + pixel[None, :] * walk.c_mid + offs_e[:, None], (there, x_out)
    expansion = load_expansion(w1_ptr, stats_ptr, offs_e, mask_e, offs_k, dtype, walk)
    taps = load_taps(wd_ptr, offs_e, mask_e, 6.0 if walk.expands else 1.0, walk)
    strip = first + tl.arange(0, walk.BLOCK_S)
    own_columns = tl.minimum(walk.W_out - strip % walk.per_image * walk.COLUMNS, walk.COLUMNS)
    own_columns = tl.where(strip < strips, own_columns, 0)
    share = (1.0 / tl.maximum(own_columns, 1).to(tl.float32))[None, :]

    yes = y0 >= 0
    above = yes if walk.pad_h == 0 else y0 > 0
    r0 = _activated_row(_below(ptrs, -1, walk), above, inside, expansion, walk, walk.pad_h == 1)
    if walk.stride == 1:
        r1 = _activated_row(ptrs, yes, inside, expansion, walk, False)
    # Moments of each strip and channel are about a mean that begins with the first number and follows: it is never so
    # far off that it costs digits. Before that it is 0, or NaN where statistics are, which the clamp of A would hide.
    MOMENTS: tl.constexpr = partials_ptr is not None
    mean = zeros(1, walk.BLOCK_E, walk.BLOCK_S)[0]
    second = mean
    if walk.expands:
        _, scale, shift, _, _ = expansion
        mean += tl.broadcast_to((scale + shift) * 0.0, mean.shape)
    CHECK: tl.constexpr = (walk.H_out - 1) * walk.stride + 2 - walk.pad_h >= walk.H  # the third row may lie below
    for step in range(0, y1 - y0, UNROLL):
        s1 = zeros(1, walk.BLOCK_E, walk.BLOCK_S)[0]
        for u in tl.static_range(UNROLL):
            if walk.stride == 1:
                middle = r1
            else:
                middle = _activated_row(ptrs, yes, inside, expansion, walk, False)
            below = (y0 + step + u) * walk.stride + 2 - walk.pad_h < walk.H
            ptrs = _below(ptrs, 1, walk)
            r2 = _activated_row(ptrs, below, inside, expansion, walk, CHECK)
            if walk.stride == 2:
                ptrs = _below(ptrs, 1, walk)
            rows = (r0, middle, r2)
            mean, s1, second = _store_row(
                rows, taps, mean, s1, second, step == 0, d_ptrs, inside_d, own_columns, mask_e, walk, MOMENTS, u == 0
            )
            d_ptrs += walk.W_out * walk.c_mid
            if walk.stride == 1:
                r0 = middle
                r1 = r2
            else:
                r0 = r2
        if MOMENTS:
            moved = s1 * (share * (1.0 / (step + UNROLL)))
            second -= s1 * moved
            mean += moved
    if MOMENTS:
        counts = (own_columns * (y1 - y0)).to(tl.float32)
        _store_strip_moments(partials_ptr, pid, counts, mean, second, offs_e, mask_e, walk.c_mid)


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
    tile: WalkTile | None = None,
) -> Launch:
    """Make ``d [N, c_mid, H_out, W_out]`` of ``x [N, c_in, H, W]``.

    ``w1 [c_mid, c_in]`` in x's type and ``stats1 [4, c_mid]`` of BN1 are None without an expansion; ``wd`` is
    ``[c_mid, 1, 3, 3]``.
    With ``moments`` the launch's argument ``partials_ptr [P, 1 + 2 c_mid]`` takes the moments of D. ``tile`` replaces
    the choice.
    """
    c_mid, H_out, W_out = d.shape[1:]
    limits = common.limits(x.device)
    tile = tile or training_tiles.expand_tile(x.shape[1], c_mid, stride, W_out, x.element_size(), limits)
    tile = tile.fitted(H_out)
    walk = walk_of(x, c_mid, 0, stride, padding, tile, expands=w1 is not None)
    strips, blocks_e = len(x) * walk.per_image, cdiv(c_mid, tile.BLOCK_E)
    groups = cdiv(strips, tile.BLOCK_S)
    ROWS = training_tiles.walk_rows(H_out, groups * blocks_e, tile, limits.processors)
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
        walk=walk,
    )
    trips = ROWS // tile.UNROLL
    grid = (programs, blocks_e)
    return Launch(_expand_depthwise_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, trips)


def expand_depthwise_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``expand_depthwise_launch``: each block of channels reads X, with the halo of strips and walks."""
    launch = expand_depthwise_launch(*arguments, **keywords)
    at, (programs, blocks_e) = launch.arguments, launch.grid
    x, d, walk = at["x_ptr"], at["d_ptr"], at["walk"]
    top, left = -walk.pad_h, -walk.pad_w if walk.halo else 0
    end = min(walk.H, top + (walk.H_out - 1) * walk.stride + 3)
    starts = range(top, top + walk.H_out * walk.stride, at["ROWS"] * walk.stride)
    rows = covered(starts, (at["ROWS"] - 1) * walk.stride + 3, end)
    columns = covered(range(left, left + walk.per_image * walk.own, walk.own), walk.own + walk.halo, walk.W)
    pixel = walk.c_x * x.element_size()
    if walk.expands:
        pixel = operand_bytes(walk.c_in, walk.BLOCK_K, x.element_size()) * blocks_e
    names = ("w1_ptr", "wd_ptr")
    small = sum(at[name].nbytes for name in names if at[name] is not None) + walk.expands * 2 * walk.c_mid * 4
    written = d.nbytes + (0 if at["partials_ptr"] is None else at["partials_ptr"].nbytes)
    return Traffic(x.nbytes + small, written, x.shape[0] * rows * columns * pixel + programs * small, written)
