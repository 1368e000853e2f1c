"""Pass B2 of the training block: from dP and D back to the expanded tensor, which is made again from X.

    dD  = ca (dP W2^T) [0 < Z2 < 6] + cb D + cc,   Z2 = D scale2 + shift2       (BN2's backward as dP and D are read)
    dA  = the transposed depthwise convolution of dD,   dWd = sums of A times dD
    dZ1 = dA [0 < Z1 < 6],   Z1 = X W1 scale1 + shift1,   dbeta1 = sum dZ1
    T   = dZ1 (W1 diag(scale1))^T,   S = X^T dZ1

T and S are thin. With c_in of at most 32 they are made here: a program goes through all of c_mid, and adds to T in its
own rows of the image; S is left as one fp32 partial a program. With more, dZ1 is stored, and ``expand_grads.py`` makes
them of it. Without an expansion dA is the input's gradient.

A program owns BLOCK_S strips (an image and COLUMNS columns of D) and the columns of X that belong to them, and walks
down ROWS rows of D for a block of channels after the other. Rows of dD, two or three, are kept in registers with the
halo's columns (``register_tiles.py``); A and dA live for a pixel.

A is held at a sixth, as a clamp to [0, 1]: 0 < Z1 < 6 is |A / 6 - 1/2| < 1/2, and 0 < Z2 < 6 is |Z2 - 3| < 3, one
comparison each whose outcome is multiplied, as a select would be two instructions. A row of dD outside the image is a
row inside times 0. NaN in A becomes 0.

Precision: X, D, dP, T and dZ1 in one type, and so W1, W1 diag(scale1) and W2 diag(ca), each rounded once; all else in
fp32. dZ1 is rounded once, for the products and for dbeta1; T once for each block of channels.
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
from .expand_depthwise import load_expansion, load_taps, operand_bytes, strip_columns
from .register_tiles import (
    blocks,
    hide_join,
    identity,
    joined,
    load_channels,
    load_exact,
    load_masked,
    load_weight,
    needs_mask,
    parted,
    product,
    replaced,
    surplus_again,
    zeros,
)
from .tiles import ExpandGradTile

ASSEMBLY = not common.INTERPRETED  # which nothing that interprets a kernel can run


@dataclass(frozen=True)
class Walk:
    """What a program of the walk knows at compile time."""

    H: int
    W: int
    H_out: int
    W_out: int
    per_image: int  # strips side by side
    columns: int  # of D that belong to a strip
    halo: int  # columns of D beside them that it reads: right, left, or in this order both
    first_halo: int  # which column the first of them is
    ahead: int  # rows of D below that a row of X needs
    stride: int
    pad_h: int
    pad_w: int
    c_in: int
    c_mid: int
    c_out: int
    expands: bool
    mask_e: bool  # whether the last block of channels isn't full
    check: bool  # whether some own column of X lies outside
    check_out: bool  # whether some own column of D lies outside
    block_s: int
    block_e: int
    block_k: int
    block_o: int
    wide: int
    precision: str


@triton.constexpr_function
def walk_of(
    H: int,
    W: int,
    C_IN: int,
    C_MID: int,
    C_OUT: int,
    STRIDE: int,
    PAD_H: int,
    PAD_W: int,
    EXPANDS: bool,
    WHOLE: bool,
    PRECISION: str,
    BLOCK_S: int,
    BLOCK_E: int,
    BLOCK_K: int,
    BLOCK_O: int,
    COLUMNS: int,
    WIDE: int,
) -> Walk:
    """The walk over images of ``H x W`` pixels; WHOLE says that the strips fill every program."""
    H_out, W_out = -(-H // STRIDE), -(-W // STRIDE)
    per_image = -(-W_out // COLUMNS)
    return Walk(
        H=H,
        W=W,
        H_out=H_out,
        W_out=W_out,
        per_image=per_image,
        columns=COLUMNS,
        halo=0 if per_image == 1 else 3 - STRIDE,
        first_halo=COLUMNS if PAD_W == 1 else -1,
        ahead=PAD_H,
        stride=STRIDE,
        pad_h=PAD_H,
        pad_w=PAD_W,
        c_in=C_IN,
        c_mid=C_MID,
        c_out=C_OUT,
        expands=EXPANDS,
        mask_e=C_MID % BLOCK_E != 0,
        check=per_image * COLUMNS * STRIDE != W or not WHOLE,
        check_out=per_image * COLUMNS != W_out or not WHOLE,
        block_s=BLOCK_S,
        block_e=BLOCK_E,
        block_k=BLOCK_K,
        block_o=BLOCK_O,
        wide=WIDE,
        precision=PRECISION,
    )


@triton.constexpr_function
def _meets(py: int, c: int, ky: int, kx: int, g: Walk) -> bool:
    """Whether tap (ky, kx) joins row py and column c of a step's pixels of X to a pixel of dD that can be there."""
    y, x = py + g.pad_h - ky, c + g.pad_w - kx
    if y % g.stride or x % g.stride or (g.per_image == 1 and c >= g.W):
        return False
    return g.halo > 0 or 0 <= x // g.stride < g.W_out


@triton.constexpr_function
def _row_of(py: int, ky: int, g: Walk) -> int:
    """Which of three rows of dD tap ky joins to row py of a step: the last is the one that the step has read."""
    return 2 - g.ahead + (py + g.pad_h - ky) // g.stride


@triton.constexpr_function
def _column_of(c: int, kx: int, g: Walk) -> int:
    """Where the column of dD that tap kx joins to column c is in the tuple of a row."""
    x = (c + g.pad_w - kx) // g.stride
    if 0 <= x < g.columns:
        return x
    return g.columns if x == g.first_halo else g.columns + 1


@triton.constexpr_function
def _checks(py: int, g: Walk) -> bool:
    """Whether pixels of X in row py of a step can lie outside the image."""
    return g.check or (py == 1 and g.H % 2 == 1)


@triton.jit
def _depthwise_out_grad(
    d_ptrs,
    dp_ptrs,
    inside,
    row,
    norm,
    w2,
    eye,
    offs_o,
    mask_e,
    g: tl.constexpr,
    n: tl.constexpr,
    CHECK: tl.constexpr,
):
    """DD of n columns, 0 where they are outside the image or ``row`` is 0, as a tuple of tiles."""
    scale, shift, cb, cc = norm
    db = product(w2, dp_ptrs, inside, offs_o, g.c_out, g.block_o, g.block_e, n * g.block_s, CHECK, g.precision)
    d = load_exact(eye, d_ptrs, mask_e, inside, g.mask_e, CHECK)
    z = tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(shift, d.shape))  # Z2 - 3
    passes = (tl.abs(z) < 6.0 * row - 3.0).to(tl.float32)
    constant = tl.broadcast_to(cc * row, d.shape)
    if CHECK:
        constant = constant * inside.to(tl.float32)[None, :]  # elsewhere outside D and dP are loaded as 0
    out = tl.fma(passes, db, tl.fma(d, tl.broadcast_to(cb * row, d.shape), constant))
    return parted(out, n, g.block_e, g.block_s)


@triton.jit
def _row(
    d_ptrs,
    dp_ptrs,
    halo_d_ptrs,
    halo_dp_ptrs,
    there,
    columns,
    halo,
    norm,
    w2,
    eye,
    offs_o,
    mask_e,
    g: tl.constexpr,
):
    """A row of dD: a strip's own columns, then those of the halo; zeros where it isn't ``there``, in the image."""
    row = there.to(tl.float32)
    out = _depthwise_out_grad(d_ptrs, dp_ptrs, columns, row, norm, w2, eye, offs_o, mask_e, g, g.columns, g.check_out)
    if g.halo > 0:
        out = out + _depthwise_out_grad(
            halo_d_ptrs, halo_dp_ptrs, halo, row, norm, w2, eye, offs_o, mask_e, g, g.halo, True
        )
    return out


@triton.jit
def _activation(ptrs, inside, weights, scale, shift, eye, offs_k, mask_e, g: tl.constexpr, CHECK: tl.constexpr):
    """A / 6 of ``wide`` columns of X, 0 outside the image; A itself without an expansion."""
    PIXELS: tl.constexpr = g.wide * g.block_s
    if g.expands:
        a = product(weights, ptrs, inside, offs_k, g.c_in, g.block_k, g.block_e, PIXELS, CHECK, g.precision)
        shift = tl.broadcast_to(shift, a.shape)
        if CHECK:
            shift = shift * inside.to(tl.float32)[None, :]
        a = tl.minimum(tl.maximum(tl.fma(a, tl.broadcast_to(scale, a.shape), shift), 0.0), 1.0)
    else:
        a = load_exact(eye, ptrs, mask_e, inside, g.mask_e, CHECK)
    return a


@triton.jit
def _transposed(a, rows, taps, sums, py: tl.constexpr, c: tl.constexpr, g: tl.constexpr):
    """DA of a pixel, and the nine sums of A times dD with its own share."""
    da = tl.zeros(a.shape, tl.float32)
    for ky in tl.static_range(3):
        for kx in tl.static_range(3):
            if _meets(py, c, ky, kx, g):
                dd = rows[_row_of(py, ky, g)][_column_of(c, kx, g)]
                da = tl.fma(dd, tl.broadcast_to(taps[3 * ky + kx], a.shape), da)
                sums = replaced(sums, 3 * ky + kx, tl.fma(a, dd, sums[3 * ky + kx]), 9)
    return da, sums


@triton.jit
def _add_to_thin(
    dz, x_ptrs, t_ptrs, inside, scaled, s_sums, b_sums, first, offs_k, g: tl.constexpr, CHECK: tl.constexpr
):
    """Add what a block of channels ``dz [block_e, pixels]`` has of T; its sums X^T dZ1 and of dZ1."""
    sums = ()
    for k in tl.static_range(blocks(g.c_in, g.block_k)):
        mask = inside[:, None] & (k * g.block_k + offs_k < g.c_in)[None, :]
        before = tl.load(t_ptrs + k * g.block_k, mask=mask & (first == 0), other=0.0).to(tl.float32)
        t = tl.dot(tl.trans(dz), scaled[k], before, input_precision=g.precision)
        tl.store(t_ptrs + k * g.block_k, t.to(t_ptrs.dtype.element_ty), mask=mask)
        surplus: tl.constexpr = needs_mask(k, g.c_in, g.block_k)
        # X once more, in the other layout: cheaper than shuffling what the first product read. Beyond c_in the sums
        # take what is there, and are not stored.
        x = load_masked(x_ptrs + k * g.block_k, inside, k * g.block_k + offs_k < g.c_in, CHECK, surplus)
        sums = sums + (tl.dot(dz, x, s_sums[k], input_precision=g.precision),)
    ones = tl.full([dz.shape[1], 8], 1.0, dz.dtype)
    return sums, tl.dot(dz, ones, b_sums, input_precision=g.precision)


@triton.jit(do_not_specialize=["strips", "chunks", "ROWS", "BLOCKS"])
def _expand_depthwise_grads_kernel(
    x_ptr,
    d_ptr,
    dp_ptr,
    w1_ptr,
    w1_scaled_ptr,
    stats1_ptr,
    wd_ptr,
    w2_ptr,
    stats2_ptr,
    coefs2_ptr,
    t_ptr,
    dz_ptr,
    s_ptr,
    beta_ptr,
    taps_ptr,
    strips,
    chunks,
    ROWS,
    BLOCKS,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # A step is a row y of D with the STRIDE rows of X at y STRIDE, for which dD is needed up to row y + ahead.
    EXPANDS: tl.constexpr = w1_ptr is not None
    THIN: tl.constexpr = t_ptr is not None
    g: tl.constexpr = walk_of(
        H,
        W,
        C_IN,
        C_MID,
        C_OUT,
        STRIDE,
        PAD_H,
        PAD_W,
        EXPANDS,
        WHOLE,
        PRECISION,
        BLOCK_S,
        BLOCK_E,
        BLOCK_K,
        BLOCK_O,
        COLUMNS,
        WIDE,
    )
    KC: tl.constexpr = blocks(C_IN, BLOCK_K)
    C_X: tl.constexpr = C_IN if EXPANDS else C_MID
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    y0 = (pid % chunks) * ROWS
    y1 = tl.minimum(y0 + ROWS, g.H_out)
    first = (pid // chunks) * BLOCK_S
    offs_k = tl.arange(0, BLOCK_K)
    offs_o = tl.arange(0, BLOCK_O)
    offs_y = surplus_again(offs_o, C_OUT, BLOCK_O)

    # The first row of dD that the walk keeps: at stride 1 row y0 beside the one above it, else row y0 - 1 + ahead.
    y_dd = tl.maximum(y0 + g.ahead - 1, 0)
    column = tl.arange(0, COLUMNS * BLOCK_S) // BLOCK_S
    n, x, there = strip_columns(first, strips, column, COLUMNS, g.per_image, BLOCK_S)
    own = ((n * g.H_out + y_dd) * g.W_out + x).to(tl.int64)
    columns = there & (x < g.W_out)
    column = tl.arange(0, (2 if g.halo == 2 else 1) * BLOCK_S) // BLOCK_S
    column = tl.where(column == 0, g.first_halo, -1)
    n, x, there = strip_columns(first, strips, column, COLUMNS, g.per_image, BLOCK_S)
    next_to = ((n * g.H_out + y_dd) * g.W_out + x).to(tl.int64)
    halo = there & (x >= 0) & (x < g.W_out)
    column = tl.arange(0, WIDE * BLOCK_S) // BLOCK_S
    n, x_in, there_in = strip_columns(first, strips, column, COLUMNS * STRIDE, g.per_image, BLOCK_S)
    pixel = ((n * H + y0 * STRIDE) * W + x_in).to(tl.int64)
    eye = identity(BLOCK_E, dtype)

    for block in range(0, BLOCKS):
        offs_e = (tl.program_id(1) * BLOCKS + block) * BLOCK_E + tl.arange(0, BLOCK_E)
        mask_e = offs_e < C_MID
        weights, scale, shift = load_expansion(w1_ptr, stats1_ptr, offs_e, mask_e, offs_k, dtype, g, C_MID)
        taps = load_taps(wd_ptr, offs_e, mask_e, 1.0, g)
        w2 = load_weight(w2_ptr, offs_e, 1, offs_o, C_MID, C_OUT, mask_e, blocks(C_OUT, BLOCK_O), BLOCK_O)
        norm = (
            load_channels(stats2_ptr + 2 * C_MID, offs_e, mask_e, g.mask_e),
            load_channels(stats2_ptr + 3 * C_MID, offs_e, mask_e, g.mask_e) - 3.0,
            load_channels(coefs2_ptr + C_MID, offs_e, mask_e, g.mask_e),
            load_channels(coefs2_ptr + 2 * C_MID, offs_e, mask_e, g.mask_e),
        )
        sums = zeros(9, BLOCK_E, BLOCK_S)
        scaled = ()
        s_sums = ()
        b_sums = tl.zeros([BLOCK_E, 8 if THIN else BLOCK_S], tl.float32)
        if THIN:
            scaled = load_weight(w1_scaled_ptr, offs_e, C_IN, offs_k, 1, C_IN, mask_e, KC, BLOCK_K)
            s_sums = zeros(KC, BLOCK_E, BLOCK_K)
            t_ptrs = t_ptr + pixel[:, None] * C_IN + offs_k[None, :]
            again_ptrs = x_ptr + pixel[:, None] * C_IN + surplus_again(offs_k, C_IN, BLOCK_K)[None, :]
        else:
            dz_ptrs = dz_ptr + pixel[None, :] * C_MID + offs_e[:, None]
        offs_x = surplus_again(offs_k, C_IN, BLOCK_K) if EXPANDS else offs_e
        x_ptrs = x_ptr + pixel[None, :] * C_X + offs_x[:, None]
        d_ptrs = d_ptr + own[None, :] * C_MID + offs_e[:, None]
        dp_ptrs = dp_ptr + own[None, :] * C_OUT + offs_y[:, None]
        halo_d_ptrs = d_ptr + next_to[None, :] * C_MID + offs_e[:, None]
        halo_dp_ptrs = dp_ptr + next_to[None, :] * C_OUT + offs_y[:, None]

        r0 = ()
        if STRIDE == 1:
            up = tl.where(y0 > 0, g.W_out, 0)
            r0 = _row(
                d_ptrs - up * C_MID,
                dp_ptrs - up * C_OUT,
                halo_d_ptrs - up * C_MID,
                halo_dp_ptrs - up * C_OUT,
                y0 > 0,
                columns,
                halo,
                norm,
                w2,
                eye,
                offs_o,
                mask_e,
                g,
            )
        begun = y0 + g.ahead > 0
        r1 = _row(d_ptrs, dp_ptrs, halo_d_ptrs, halo_dp_ptrs, begun, columns, halo, norm, w2, eye, offs_o, mask_e, g)
        for step in range(y0, y1, UNROLL):
            for u in tl.static_range(UNROLL):
                y = step + u
                more = y + g.ahead < g.H_out
                down = tl.where(more & (y + g.ahead > 0), g.W_out, 0)
                d_ptrs += down * C_MID
                dp_ptrs += down * C_OUT
                halo_d_ptrs += down * C_MID
                halo_dp_ptrs += down * C_OUT
                r2 = _row(
                    d_ptrs, dp_ptrs, halo_d_ptrs, halo_dp_ptrs, more, columns, halo, norm, w2, eye, offs_o, mask_e, g
                )
                for py in tl.static_range(STRIDE):
                    for b in tl.static_range(COLUMNS * STRIDE // WIDE):
                        at = py * W + b * WIDE
                        inside = there_in & (x_in + b * WIDE < W)
                        if py == 1 and H % 2 == 1:
                            inside = inside & (y * STRIDE + py < H)
                        wide = _activation(
                            x_ptrs + at * C_X, inside, weights, scale, shift, eye, offs_k, mask_e, g, _checks(py, g)
                        )
                        a = parted(wide, WIDE, BLOCK_E, BLOCK_S)
                        dz = ()
                        for j in tl.static_range(WIDE):
                            da, sums = _transposed(a[j], (r0, r1, r2), taps, sums, py, b * WIDE + j, g)
                            if (
                                EXPANDS
                            ):  # times 0 or 1: of a select the compiler makes two of 16 bits behind the rounding
                                da = da * (tl.abs(a[j] - 0.5) < 0.5).to(tl.float32)
                                if not THIN:
                                    b_sums += da.to(dtype).to(tl.float32)  # as S will have it
                            dz = dz + (da,)
                        tile = hide_join(joined(dz, WIDE, BLOCK_E, BLOCK_S), ASSEMBLY).to(dtype)
                        if THIN:
                            s_sums, b_sums = _add_to_thin(
                                tile,
                                again_ptrs + at * C_IN,
                                t_ptrs + at * C_IN,
                                inside,
                                scaled,
                                s_sums,
                                b_sums,
                                block == 0,
                                offs_k,
                                g,
                                _checks(py, g),
                            )
                        else:
                            tl.store(dz_ptrs + at * C_MID, tile, mask=inside[None, :] & mask_e[:, None])
                x_ptrs += STRIDE * W * C_X
                if THIN:
                    t_ptrs += STRIDE * W * C_IN
                    again_ptrs += STRIDE * W * C_IN
                else:
                    dz_ptrs += STRIDE * W * C_MID
                if STRIDE == 1:
                    r0 = r1
                r1 = r2
        offs_p = pid.to(tl.int64)
        for t in tl.static_range(9):
            total = tl.sum(sums[t], axis=1) * (6.0 if EXPANDS else 1.0)
            tl.store(taps_ptr + (offs_p * 9 + t) * C_MID + offs_e, total, mask=mask_e)
        if EXPANDS:
            total = tl.sum(b_sums, axis=1) * (0.125 if THIN else 1.0)  # of eight equal columns
            tl.store(beta_ptr + offs_p * C_MID + offs_e, total, mask=mask_e)
        if THIN:
            for k in tl.static_range(KC):
                offs = k * BLOCK_K + offs_k
                s_ptrs = s_ptr + (offs_p * C_IN + offs[None, :]) * C_MID + offs_e[:, None]
                tl.store(s_ptrs, s_sums[k], mask=(offs < C_IN)[None, :] & mask_e[:, None])
            tl.debug_barrier()  # the next block of channels reads T, which other threads have written


def expand_depthwise_grads_launch(
    x: Tensor,
    d: Tensor,
    dp: Tensor,
    w1: Tensor | None,
    w1_scaled: Tensor | None,
    stats1: Tensor | None,
    wd: Tensor,
    w2_scaled: Tensor,
    stats2: Tensor,
    coefs2: Tensor,
    out: Tensor,
    stride: int,
    padding: str,
    *,
    tile: ExpandGradTile | None = None,
) -> Launch:
    """Walk back from ``dp [N, c_out, H_out, W_out]`` and ``d [N, c_mid, H_out, W_out]`` to ``x [N, c_in, H, W]``.

    ``out`` is T with x's shape, or dZ1 ``[N, c_mid, H, W]``, or without an expansion dA. ``w1 [c_mid, c_in]``,
    ``w1_scaled`` with BN1's scale and ``stats1 [4, c_mid]`` are None there, ``w1_scaled`` where it isn't T too. ``wd``
    is ``[c_mid, 1, 3, 3]``, ``w2_scaled [c_out, c_mid]`` has the first of ``coefs2 [3, c_mid]``, which with stats2 is
    BN2's. Weights but ``wd`` have x's type.

    The launch's arguments take fp32 partials: ``taps_ptr [P, 9, c_mid]`` of dWd, with an expansion
    ``beta_ptr [P, 1, c_mid]`` of dbeta1, and with T ``s_ptr [P, c_in, c_mid]`` of S.
    """
    N, c_in, H, W = x.shape
    c_out, (c_mid, H_out, W_out) = dp.shape[1], d.shape[1:]
    expands = w1 is not None
    thin = expands and out.shape[1] == c_in
    limits = common.limits(x.device)
    if tile is None:
        sizes = (c_in, c_mid, c_out, stride, W_out, x.element_size())
        tile = tiles.expand_grad_tile(*sizes, limits, expands=expands)
    tile = tile.fitted(H_out)
    strips, blocks_e = N * cdiv(W_out, tile.COLUMNS), cdiv(c_mid, tile.BLOCK_E)
    side, each = (1, blocks_e) if thin else (blocks_e, 1)
    groups = cdiv(strips, tile.BLOCK_S)
    ROWS = tiles.walk_rows(H_out, groups * side, tile, limits.processors)
    P = groups * cdiv(H_out, ROWS)

    def partials(rows: int) -> Tensor:
        return common.allocate((P, rows, c_mid), x, torch.float32)

    arguments = dict(
        x_ptr=x,
        d_ptr=d,
        dp_ptr=dp,
        w1_ptr=w1,
        w1_scaled_ptr=w1_scaled if thin else None,
        stats1_ptr=stats1,
        wd_ptr=wd,
        w2_ptr=w2_scaled,
        stats2_ptr=stats2,
        coefs2_ptr=coefs2,
        t_ptr=out if thin else None,
        dz_ptr=None if thin else out,
        s_ptr=partials(c_in) if thin else None,
        beta_ptr=partials(1) if expands else None,
        taps_ptr=partials(9),
        strips=strips,
        chunks=cdiv(H_out, ROWS),
        ROWS=ROWS,
        BLOCKS=each,
        H=H,
        W=W,
        C_IN=c_in,
        C_MID=c_mid,
        C_OUT=c_out,
        STRIDE=stride,
        PAD_H=front_padding(H, stride, padding),
        PAD_W=front_padding(W, stride, padding),
        WHOLE=strips % tile.BLOCK_S == 0,
        PRECISION=common.dot_precision(x),
        ASSEMBLY=ASSEMBLY,
        BLOCK_S=tile.BLOCK_S,
        BLOCK_E=tile.BLOCK_E,
        BLOCK_K=tiles.block_k(c_in),
        BLOCK_O=tiles.block_k(c_out),
        COLUMNS=tile.COLUMNS,
        WIDE=tile.WIDE,
        UNROLL=tile.UNROLL,
    )
    kernel, trips = _expand_depthwise_grads_kernel, each * (ROWS // tile.UNROLL)
    return Launch(kernel, (P, side), arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, trips)


def expand_depthwise_grads_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``expand_depthwise_grads_launch``: each block of channels reads X and dP, and D with its halo."""
    launch = expand_depthwise_grads_launch(*arguments, **keywords)
    at, programs = launch.arguments, launch.grid[0]
    x, d, dp, W_out, stride = at["x_ptr"], at["d_ptr"], at["dp_ptr"], at["d_ptr"].shape[3], at["STRIDE"]
    N, (H_out, size) = len(x), (d.shape[2], x.element_size())
    g = walk_of(
        *(at[name] for name in ("H", "W", "C_IN", "C_MID", "C_OUT", "STRIDE", "PAD_H", "PAD_W")),
        at["w1_ptr"] is not None,
        *(at[name] for name in ("WHOLE", "PRECISION", "BLOCK_S", "BLOCK_E", "BLOCK_K", "BLOCK_O", "COLUMNS", "WIDE")),
    )
    blocks_e = cdiv(g.c_mid, g.block_e)
    left = -1 if g.halo and (g.halo == 2 or g.first_halo == -1) else 0
    columns = covered(range(left, left + g.per_image * g.columns, g.columns), g.columns + g.halo, W_out)
    # A walk reads a row for each of its own and those before the first; outside the image the nearest again.
    rows = H_out + at["chunks"] * (3 - stride)
    pixels = N * rows * columns
    loaded = pixels * (g.c_mid * size + operand_bytes(g.c_out, g.block_o, size) * blocks_e)
    weights = (at[name] for name in ("w1_ptr", "w1_scaled_ptr", "wd_ptr", "w2_ptr"))
    small = sum(weight.nbytes for weight in weights if weight is not None) + (4 + 2 * g.expands) * g.c_mid * 4
    partials = sum(at[name].nbytes for name in ("s_ptr", "beta_ptr", "taps_ptr") if at[name] is not None)
    thin = at["t_ptr"] is not None
    out = at["t_ptr"] if thin else at["dz_ptr"]
    once = x.nbytes if not g.expands else x[:, 0].numel() * operand_bytes(g.c_in, g.block_k, size) * blocks_e
    loaded += 2 * once + out.nbytes * (blocks_e - 1) if thin else once  # T was written here: memory needn't be read
    return Traffic(
        x.nbytes + d.nbytes + dp.nbytes + small,
        out.nbytes + partials,
        loaded + programs * small,
        out.nbytes * (blocks_e if thin else 1) + partials,
    )
