"""Pass B2 of the training block: from dP and D back to the expanded tensor, which is made again from X.

    dD  = ca (dP W2^T) [0 < Z2 < 6] + cb D + cc,   Z2 = D scale2 + shift2       (BN2's backward as dP and D are read)
    dA  = the transposed depthwise convolution of dD,   dWd = sums of A times dD
    dZ1 = dA [0 < Z1 < 6],   Z1 = X W1 scale1 + shift1,   dbeta1 = sum dZ1
    T   = dZ1 (W1 diag(scale1))^T,   S = X^T dZ1

T and S are thin. With c_in of at most 32 they are made here: a program goes through all of c_mid, and adds to T in its
own rows of the image; S and dbeta1 are left as one fp32 partial a program. With more, dZ1 is stored, and
``expand_grads.py`` makes them of it. Without an expansion dA is the input's gradient.

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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, training_tiles
from .common import Launch, Traffic, cdiv, covered
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
    operand_bytes,
    parted,
    product,
    replaced,
    store_masked,
    surplus_again,
    zeros,
)
from .training_tiles import WalkTile
from .walks import Walk, activation, load_expansion, load_taps, strip_columns, walk_of

ASSEMBLY = not common.INTERPRETED  # which nothing that interprets a kernel can run


@triton.constexpr_function
def _meets(py: int, c: int, ky: int, kx: int, walk: Walk) -> bool:
    """Whether tap (ky, kx) joins row py and column c of a step's pixels of X to a pixel of dD that can be there."""
    y, x = py + walk.pad_h - ky, c + walk.pad_w - kx
    if y % walk.stride or x % walk.stride or (walk.per_image == 1 and c >= walk.W):
        return False
    return walk.halo > 0 or 0 <= x // walk.stride < walk.W_out


@triton.constexpr_function
def _row_of(py: int, ky: int, walk: Walk) -> int:
    """Which of three rows of dD tap ky joins to row py of a step: the last is the one that the step has read."""
    return 2 - walk.pad_h + (py + walk.pad_h - ky) // walk.stride


@triton.constexpr_function
def _column_of(c: int, kx: int, walk: Walk) -> int:
    """Where the column of dD that tap kx joins to column c is in the tuple of a row."""
    x = (c + walk.pad_w - kx) // walk.stride
    if 0 <= x < walk.COLUMNS:
        return x
    return walk.COLUMNS if x > 0 or walk.halo == 1 else walk.COLUMNS + 1  # of the halo right comes first


@triton.constexpr_function
def _checks(py: int, walk: Walk) -> bool:
    """Whether pixels of X in row py of a step can lie outside the image."""
    return walk.check or (py == 1 and walk.H % 2 == 1)


@triton.jit
def _load_projection(w2_ptr, stats2_ptr, coefs2_ptr, offs_e, mask_e, offs_o, dtype: tl.constexpr, walk: tl.constexpr):
    """What makes dD of dP and D: W2 as tiles [BLOCK_E, BLOCK_O] and BN2 as columns [BLOCK_E, 1].

    A tuple of these, the identity by which D is loaded, and what addresses the channels.
    """
    OC: tl.constexpr = blocks(walk.c_out, walk.BLOCK_O)
    w2 = load_weight(w2_ptr, offs_e, 1, offs_o, walk.c_mid, walk.c_out, mask_e, walk.mask_e, OC, walk.BLOCK_O)
    scale = load_channels(stats2_ptr + 2 * walk.c_mid, offs_e, mask_e, walk.mask_e)
    shift = load_channels(stats2_ptr + 3 * walk.c_mid, offs_e, mask_e, walk.mask_e) - 3.0
    cb = load_channels(coefs2_ptr + walk.c_mid, offs_e, mask_e, walk.mask_e)
    cc = load_channels(coefs2_ptr + 2 * walk.c_mid, offs_e, mask_e, walk.mask_e)
    return w2, scale, shift, cb, cc, identity(walk.BLOCK_E, dtype), offs_o, mask_e


@triton.jit
def _depthwise_out_grad(ptrs, inside, row, projection, walk: tl.constexpr, n: tl.constexpr, CHECK: tl.constexpr):
    """A tuple of tiles: dD of n columns, 0 where they are outside the image or ``row`` is 0."""
    d_ptrs, dp_ptrs = ptrs
    w2, scale, shift, cb, cc, eye, offs_o, mask_e = projection
    PIXELS: tl.constexpr = n * walk.BLOCK_S
    db = product(w2, dp_ptrs, inside, offs_o, walk.c_out, walk.BLOCK_O, walk.BLOCK_E, PIXELS, CHECK, walk.precision)
    d = load_exact(eye, d_ptrs, mask_e, inside, walk.mask_e, CHECK)
    z = tl.fma(d, tl.broadcast_to(scale, d.shape), tl.broadcast_to(shift, d.shape))  # Z2 - 3
    passes = (tl.abs(z) < 6.0 * row - 3.0).to(tl.float32)
    constant = tl.broadcast_to(cc * row, d.shape)
    if CHECK:
        constant = constant * inside.to(tl.float32)[None, :]  # elsewhere outside D and dP are loaded as 0
    out = tl.fma(passes, db, tl.fma(d, tl.broadcast_to(cb * row, d.shape), constant))
    return parted(out, n, walk.BLOCK_E, walk.BLOCK_S)


@triton.jit
def _row(ptrs, there, inside, projection, walk: tl.constexpr):
    """A row of dD: a strip's own columns, then those of the halo; zeros where it isn't ``there``, in the image.

    ``ptrs`` are those of D and dP, of a strip's own columns and then of the halo, and so is ``inside``.
    """
    row = there.to(tl.float32)
    own, halo = inside
    out = _depthwise_out_grad(ptrs[:2], own, row, projection, walk, walk.COLUMNS, walk.check_out)
    if walk.halo > 0:
        out = out + _depthwise_out_grad(ptrs[2:], halo, row, projection, walk, walk.halo, True)
    return out


@triton.jit
def _moved(ptrs, pixels, walk: tl.constexpr):
    """``ptrs`` of D and dP so many pixels on."""
    d_ptrs, dp_ptrs, halo_d_ptrs, halo_dp_ptrs = ptrs
    d, dp = pixels * walk.c_mid, pixels * walk.c_out
    return d_ptrs + d, dp_ptrs + dp, halo_d_ptrs + d, halo_dp_ptrs + dp


@triton.jit
def _transposed(a, rows, taps, sums, py: tl.constexpr, c: tl.constexpr, walk: tl.constexpr):
    """What a pixel has of dA, and the nine sums of A times dD with its own share."""
    da = tl.zeros(a.shape, tl.float32)
    for ky in tl.static_range(3):
        for kx in tl.static_range(3):
            if _meets(py, c, ky, kx, walk):
                dd = rows[_row_of(py, ky, walk)][_column_of(c, kx, walk)]
                da = tl.fma(dd, tl.broadcast_to(taps[3 * ky + kx], a.shape), da)
                sums = replaced(sums, 3 * ky + kx, tl.fma(a, dd, sums[3 * ky + kx]), 9)
    return da, sums


@triton.jit
def _expanded_grad(
    ptrs,
    inside,
    rows,
    expansion,
    taps,
    sums,
    walk: tl.constexpr,
    py: tl.constexpr,
    first: tl.constexpr,
    CHECK: tl.constexpr,
):
    """For WIDE columns of X from ``first`` on dZ1 (without an expansion dA), and the sums for dWd with their share."""
    WIDE: tl.constexpr = walk.WIDE
    wide = activation(ptrs, inside, inside, None, expansion, walk, WIDE, CHECK, CHECK)
    a = parted(wide, WIDE, walk.BLOCK_E, walk.BLOCK_S)
    dz = ()
    for j in tl.static_range(WIDE):
        da, sums = _transposed(a[j], rows, taps, sums, py, first + j, walk)
        if walk.expands:  # times 0 or 1: of a select the compiler makes two of 16 bits behind the rounding
            da = da * (tl.abs(a[j] - 0.5) < 0.5).to(tl.float32)
        dz = dz + (da,)
    return joined(dz, WIDE, walk.BLOCK_E, walk.BLOCK_S), sums


@triton.jit
def _add_to_thin(dz, x_ptrs, t_ptrs, inside, thin, s_sums, b_sums, walk: tl.constexpr, CHECK: tl.constexpr):
    """Add what a block of channels ``dz [BLOCK_E, pixels]`` has of T; its sums X^T dZ1 and of dZ1."""
    scaled, fresh, offs_k = thin
    sums = ()
    for k in tl.static_range(blocks(walk.c_in, walk.BLOCK_K)):
        at = k * walk.BLOCK_K
        mask = inside[:, None] & (at + offs_k < walk.c_in)[None, :]
        before = tl.load(t_ptrs + at, mask=mask & (fresh == 0), other=0.0).to(tl.float32)
        t = tl.dot(tl.trans(dz), scaled[k], before, input_precision=walk.precision)
        tl.store(t_ptrs + at, t.to(t_ptrs.dtype.element_ty), mask=mask)
        surplus: tl.constexpr = needs_mask(k, walk.c_in, walk.BLOCK_K)
        # X once more, in the other layout: cheaper than shuffling what the first product read. Beyond c_in the sums
        # take what is there, and are not stored.
        x = load_masked(x_ptrs + at, inside, at + offs_k < walk.c_in, CHECK, surplus)
        sums = sums + (tl.dot(dz, x, s_sums[k], input_precision=walk.precision),)
    ones = tl.full([dz.shape[1], 8], 1.0, dz.dtype)
    return sums, tl.dot(dz, ones, b_sums, input_precision=walk.precision)


@triton.jit
def _rows_of_x(
    ptrs,
    there,
    x_in,
    y,
    rows,
    expansion,
    taps,
    thin,
    sums,
    walk: tl.constexpr,
    THIN: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Go through a step's rows of X below three ``rows`` of dD: store dZ1 or add it to T, and return the sums.

    ``ptrs`` are those of X, of X in the other layout, and of T or dZ1, ``there`` and ``x_in`` their strips and columns,
    ``y`` the step's row of D.
    """
    STRIDE: tl.constexpr = walk.stride
    x_ptrs, again_ptrs, out_ptrs = ptrs
    wd_sums, s_sums, b_sums = sums
    for py in tl.static_range(STRIDE):
        for b in tl.static_range(walk.own // walk.WIDE):
            at = py * walk.W + b * walk.WIDE
            inside = there & (x_in + b * walk.WIDE < walk.W)
            if py == 1 and walk.H % 2 == 1:
                inside = inside & (y * walk.stride + py < walk.H)
            x = x_ptrs + at * walk.c_x
            dz, wd_sums = _expanded_grad(
                x, inside, rows, expansion, taps, wd_sums, walk, py, b * walk.WIDE, _checks(py, walk)
            )
            dz = hide_join(dz, ASSEMBLY).to(out_ptrs.dtype.element_ty)
            if THIN:
                again, t = again_ptrs + at * walk.c_in, out_ptrs + at * walk.c_in
                s_sums, b_sums = _add_to_thin(dz, again, t, inside, thin, s_sums, b_sums, walk, _checks(py, walk))
            else:
                _, _, _, _, mask_e = expansion
                store_masked(out_ptrs + at * walk.c_mid, dz, mask_e, inside, walk.mask_e, _checks(py, walk))
    return wd_sums, s_sums, b_sums


@triton.jit
def _pixels(first, strips, y_dd, y_in, walk: tl.constexpr):
    """Pixels (64-bit) of a program's strips: of D in row ``y_dd``, own and halo, and which of them lie in the image; of
    X in row ``y_in``, WIDE columns, with the strips that are there and their columns.
    """
    column = tl.arange(0, walk.COLUMNS * walk.BLOCK_S) // walk.BLOCK_S
    n, x, there = strip_columns(first, strips, column, walk.COLUMNS, walk)
    own = ((n * walk.H_out + y_dd) * walk.W_out + x).to(tl.int64)
    own_inside = there & (x < walk.W_out)
    column = tl.arange(0, (2 if walk.halo == 2 else 1) * walk.BLOCK_S) // walk.BLOCK_S
    column = tl.where((column == 0) & (walk.pad_w == 1), walk.COLUMNS, -1)
    n, x, there = strip_columns(first, strips, column, walk.COLUMNS, walk)
    halo = ((n * walk.H_out + y_dd) * walk.W_out + x).to(tl.int64)
    halo_inside = there & (x >= 0) & (x < walk.W_out)
    column = tl.arange(0, walk.WIDE * walk.BLOCK_S) // walk.BLOCK_S
    n, x_in, there = strip_columns(first, strips, column, walk.own, walk)
    pixel = ((n * walk.H + y_in) * walk.W + x_in).to(tl.int64)
    return own, halo, (own_inside, halo_inside), pixel, there, x_in


@triton.jit
def _store_sums(taps_ptr, beta_ptr, s_ptr, program, sums, offs_e, mask_e, offs_k, walk: tl.constexpr):
    """The program's partials: of dWd, and where they are made here those of dbeta1 and S."""
    wd_sums, s_sums, b_sums = sums
    for t in tl.static_range(9):
        total = tl.sum(wd_sums[t], axis=1) * (6.0 if walk.expands else 1.0)
        tl.store(taps_ptr + (program * 9 + t) * walk.c_mid + offs_e, total, mask=mask_e)
    if s_ptr is not None:
        total = tl.sum(b_sums, axis=1) * 0.125  # of eight equal columns
        tl.store(beta_ptr + program * walk.c_mid + offs_e, total, mask=mask_e)
        for k in tl.static_range(blocks(walk.c_in, walk.BLOCK_K)):
            offs = k * walk.BLOCK_K + offs_k
            s_ptrs = s_ptr + (program * walk.c_in + offs[None, :]) * walk.c_mid + offs_e[:, None]
            tl.store(s_ptrs, s_sums[k], mask=(offs < walk.c_in)[None, :] & mask_e[:, None])


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
    walk: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    # A step is a row y of D with the rows of X at y stride and below it, for which dD is needed up to row y + pad_h.
    THIN: tl.constexpr = t_ptr is not None
    UNROLL: tl.constexpr = walk.UNROLL
    KC: tl.constexpr = blocks(walk.c_in, walk.BLOCK_K)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid = tl.program_id(0)
    y0 = (pid % chunks) * ROWS
    y1 = tl.minimum(y0 + ROWS, walk.H_out)
    offs_k = tl.arange(0, walk.BLOCK_K)
    offs_o = tl.arange(0, walk.BLOCK_O)
    offs_y = surplus_again(offs_o, walk.c_out, walk.BLOCK_O)
    # The first row of dD that the walk keeps: at stride 1 row y0 beside the one above it, else row y0 - 1 + pad_h.
    y_dd = tl.maximum(y0 + walk.pad_h - 1, 0)
    own, halo, inside, pixel, there, x_in = _pixels(
        (pid // chunks) * walk.BLOCK_S, strips, y_dd, y0 * walk.stride, walk
    )
    for block in range(0, BLOCKS):
        offs_e = (tl.program_id(1) * BLOCKS + block) * walk.BLOCK_E + tl.arange(0, walk.BLOCK_E)
        mask_e = offs_e < walk.c_mid
        expansion = load_expansion(w1_ptr, stats1_ptr, offs_e, mask_e, offs_k, dtype, walk)
        projection = _load_projection(w2_ptr, stats2_ptr, coefs2_ptr, offs_e, mask_e, offs_o, dtype, walk)
        taps = load_taps(wd_ptr, offs_e, mask_e, 1.0, walk)
        thin = ()
        s_sums = ()
        offs_x = surplus_again(offs_k, walk.c_in, walk.BLOCK_K) if walk.expands else offs_e
        x_ptrs = x_ptr + pixel[None, :] * walk.c_x + offs_x[:, None]
        again_ptrs = x_ptrs
        if THIN:
            scaled = load_weight(
                w1_scaled_ptr, offs_e, walk.c_in, offs_k, 1, walk.c_in, mask_e, walk.mask_e, KC, walk.BLOCK_K
            )
            thin = (scaled, block == 0, offs_k)
            s_sums = zeros(KC, walk.BLOCK_E, walk.BLOCK_K)
            again_ptrs = x_ptr + pixel[:, None] * walk.c_in + offs_x[None, :]
            out_ptrs = t_ptr + pixel[:, None] * walk.c_in + offs_k[None, :]
        else:
            out_ptrs = dz_ptr + pixel[None, :] * walk.c_mid + offs_e[:, None]
        sums = (zeros(9, walk.BLOCK_E, walk.BLOCK_S), s_sums, zeros(1, walk.BLOCK_E, 8)[0])
        ptrs = (
            d_ptr + own[None, :] * walk.c_mid + offs_e[:, None],
            dp_ptr + own[None, :] * walk.c_out + offs_y[:, None],
            d_ptr + halo[None, :] * walk.c_mid + offs_e[:, None],
            dp_ptr + halo[None, :] * walk.c_out + offs_y[:, None],
        )

        r0 = ()
        if walk.stride == 1:
            r0 = _row(_moved(ptrs, tl.where(y0 > 0, -walk.W_out, 0), walk), y0 > 0, inside, projection, walk)
        r1 = _row(ptrs, y0 + walk.pad_h > 0, inside, projection, walk)
        for step in range(y0, y1, UNROLL):
            for u in tl.static_range(UNROLL):
                y = step + u
                more = y + walk.pad_h < walk.H_out
                ptrs = _moved(ptrs, tl.where(more & (y + walk.pad_h > 0), walk.W_out, 0), walk)
                r2 = _row(ptrs, more, inside, projection, walk)
                of_x = (x_ptrs, again_ptrs, out_ptrs)
                sums = _rows_of_x(of_x, there, x_in, y, (r0, r1, r2), expansion, taps, thin, sums, walk, THIN, ASSEMBLY)
                x_ptrs += walk.stride * walk.W * walk.c_x
                again_ptrs += walk.stride * walk.W * walk.c_x
                out_ptrs += walk.stride * walk.W * (walk.c_in if THIN else walk.c_mid)
                if walk.stride == 1:
                    r0 = r1
                r1 = r2
        _store_sums(taps_ptr, beta_ptr, s_ptr, pid.to(tl.int64), sums, offs_e, mask_e, offs_k, walk)
        if THIN:
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
    tile: WalkTile | None = None,
) -> Launch:
    """Walk back from ``dp [N, c_out, H_out, W_out]`` and ``d [N, c_mid, H_out, W_out]`` to ``x [N, c_in, H, W]``.

    ``out`` is T with x's shape, or dZ1 ``[N, c_mid, H, W]``, or without an expansion dA. ``w1 [c_mid, c_in]``,
    ``w1_scaled`` with BN1's scale and ``stats1 [4, c_mid]`` are None there, ``w1_scaled`` where it isn't T too. ``wd``
    is ``[c_mid, 1, 3, 3]``, ``w2_scaled [c_out, c_mid]`` has the first of ``coefs2 [3, c_mid]``, which with stats2 is
    BN2's. Weights but ``wd`` have x's type.

    The launch's arguments take fp32 partials: ``taps_ptr [P, 9, c_mid]`` of dWd, and with T ``beta_ptr [P, 1, c_mid]``
    of dbeta1 and ``s_ptr [P, c_in, c_mid]`` of S.
    """
    c_in, c_out, (c_mid, H_out, W_out) = x.shape[1], dp.shape[1], d.shape[1:]
    expands = w1 is not None
    thin = w1_scaled is not None
    assert out.shape[1] == (c_in if thin else c_mid)
    limits = common.limits(x.device)
    if tile is None:
        sizes = (c_in, c_mid, c_out, stride, W_out, x.element_size())
        tile = training_tiles.expand_grad_tile(*sizes, limits, expands=expands)
    tile = tile.fitted(H_out)
    walk = walk_of(x, c_mid, c_out, stride, padding, tile, expands=expands)
    strips, blocks_e = len(x) * walk.per_image, cdiv(c_mid, tile.BLOCK_E)
    side, each = (1, blocks_e) if thin else (blocks_e, 1)
    groups = cdiv(strips, tile.BLOCK_S)
    ROWS = training_tiles.walk_rows(H_out, groups * side, tile, limits.processors)
    P = groups * cdiv(H_out, ROWS)

    def partials(rows: int) -> Tensor:
        return common.allocate((P, rows, c_mid), x, torch.float32)

    arguments = dict(
        x_ptr=x,
        d_ptr=d,
        dp_ptr=dp,
        w1_ptr=w1,
        w1_scaled_ptr=w1_scaled,
        stats1_ptr=stats1,
        wd_ptr=wd,
        w2_ptr=w2_scaled,
        stats2_ptr=stats2,
        coefs2_ptr=coefs2,
        t_ptr=out if thin else None,
        dz_ptr=None if thin else out,
        s_ptr=partials(c_in) if thin else None,
        beta_ptr=partials(1) if thin else None,
        taps_ptr=partials(9),
        strips=strips,
        chunks=cdiv(H_out, ROWS),
        ROWS=ROWS,
        BLOCKS=each,
        walk=walk,
        ASSEMBLY=ASSEMBLY,
    )
    kernel, trips = _expand_depthwise_grads_kernel, each * (ROWS // tile.UNROLL)
    return Launch(kernel, (P, side), arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, trips)


def expand_depthwise_grads_bytes(*arguments: Any, **keywords: Any) -> Traffic:
    """Bytes of ``expand_depthwise_grads_launch``: each block of channels reads X and dP, and D with its halo."""
    launch = expand_depthwise_grads_launch(*arguments, **keywords)
    at, programs, walk = launch.arguments, launch.grid[0], launch.arguments["walk"]
    x, d, dp = at["x_ptr"], at["d_ptr"], at["dp_ptr"]
    size, blocks_e = x.element_size(), cdiv(walk.c_mid, walk.BLOCK_E)
    left = -1 if walk.halo and (walk.halo == 2 or walk.pad_w == 0) else 0
    starts = range(left, left + walk.per_image * walk.COLUMNS, walk.COLUMNS)
    columns = covered(starts, walk.COLUMNS + walk.halo, walk.W_out)
    # A walk reads a row for each of its own and those before the first; outside the image the nearest again.
    rows = walk.H_out + at["chunks"] * (3 - walk.stride)
    pixels = len(x) * rows * columns
    loaded = pixels * (walk.c_mid * size + operand_bytes(walk.c_out, walk.BLOCK_O, size) * blocks_e)
    weights = (at[name] for name in ("w1_ptr", "w1_scaled_ptr", "wd_ptr", "w2_ptr"))
    small = sum(weight.nbytes for weight in weights if weight is not None) + (4 + 2 * walk.expands) * walk.c_mid * 4
    partials = sum(at[name].nbytes for name in ("s_ptr", "beta_ptr", "taps_ptr") if at[name] is not None)
    thin = at["t_ptr"] is not None
    out = at["t_ptr"] if thin else at["dz_ptr"]
    once = x.nbytes
    if walk.expands:
        once = x[:, 0].numel() * operand_bytes(walk.c_in, walk.BLOCK_K, size) * blocks_e
    loaded += 2 * once + out.nbytes * (blocks_e - 1) if thin else once  # T was written here: memory needn't be read
    return Traffic(
        x.nbytes + d.nbytes + dp.nbytes + small,
        out.nbytes + partials,
        loaded + programs * small,
        out.nbytes * (blocks_e if thin else 1) + partials,
    )
