"""Depthwise 3x3 convolution, the passes: forward, input gradient, weight gradient, and both gradients in one.

    Y[n, y, x, c]  = sum over ky, kx of  X[n, s y + ky - p, s x + kx - p, c] w[c, ky, kx]
    dX[n, i, j, c] = sum over (y, ky), (x, kx) with s y + ky - p = i, s x + kx - p = j of  dY[n, y, x, c] w[c, ky, kx]
    dw[c, ky, kx]  = sum over n, y, x of  dY[n, y, x, c] X[n, s y + ky - p, s x + kx - p, c]

with stride s of 1 or 2, p zeros in front (1, or 0 for TensorFlow's "same" at stride 2 and an even size) and zeros
wherever X or dY ends. The convolution is bound by memory, so each pass reads every tensor once: a program owns BLOCK_M
strips of COLUMNS columns by BLOCK_C channels and walks down ROWS rows. The columns are a tuple of [BLOCK_M, BLOCK_C]
register tiles, so that a tap's shift in x is another element of the tuple and a shift in y the tuple of an earlier row.
Both gradients pair the same dY with X and w, and are one pass where both are needed.

Precision: X, dY, Y, dX in fp16, bf16 or fp32; w in the same type or in fp32, then rounded to X's type as it is loaded;
sums in fp32. dw is left as one fp32 partial a program, to be added in a fixed order (``partials.py``).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common, tiles
from .common import Launch, Traffic, cdiv, covered, front_padding

# Sizes are arguments that are never specialised: one compiled kernel serves every batch, and every resolution with the
# same tile and padding.
_SIZES = ["strips", "strips_w", "H", "W", "H_out", "W_out", "ROWS", "chunks"]


@triton.jit
def _owned(
    rows, strips, strips_w, ROWS, chunks, C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr
):
    """What this program owns: rows [first, last), image and first column of each strip, channels, and their mask."""
    pid = tl.program_id(0)
    first = (pid % chunks) * ROWS  # neighbours in the grid share the halo's rows in L2
    last = tl.minimum(first + ROWS, rows)
    strip = (pid // chunks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (strip < strips)[:, None] & (offs_c < C)[None, :]
    return first, last, strip // strips_w, strip % strips_w * COLUMNS, offs_c, mask


@triton.jit
def _pixels(ptr, n, x, offs_c, H, W, C):
    """Pointers [BLOCK_M, BLOCK_C] to pixel (0, x) of image n. 64-bit, as all that is added to them."""
    return ptr + ((n.to(tl.int64) * H * W + x) * C)[:, None] + offs_c[None, :]


@triton.jit
def _load_row(ptrs, y, x, mask, H, W, C: tl.constexpr, n: tl.constexpr):
    """Pixels x ... x + n - 1 of row y as n fp32 tiles [BLOCK_M, BLOCK_C], zero outside the image."""
    row = ptrs + W.to(tl.int64) * C * y
    inside = mask & (y >= 0) & (y < H)
    tiles = ()
    for j in tl.static_range(n):
        ok = inside & ((x + j >= 0) & (x + j < W))[:, None]
        tiles = tiles + (tl.load(row + j * C, mask=ok, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _load_taps(w_ptr, offs_c, dtype, C):
    """The nine taps of w [C, 3, 3] as fp32 rows [1, BLOCK_C], rounded to the type of X."""
    taps = ()
    for t in tl.static_range(9):
        tap = tl.load(w_ptr + offs_c * 9 + t, mask=offs_c < C, other=0.0).to(dtype).to(tl.float32)
        taps = taps + (tap[None, :],)
    return taps


@triton.jit(do_not_specialize=_SIZES)
def _depthwise_fwd_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    strips,
    strips_w,
    H,
    W,
    H_out,
    W_out,
    ROWS,
    chunks,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first, last, n, x_out, offs_c, mask = _owned(H_out, strips, strips_w, ROWS, chunks, C, BLOCK_M, BLOCK_C, COLUMNS)
    WINDOW: tl.constexpr = STRIDE * (COLUMNS - 1) + 3
    x_in = x_out * STRIDE - PAD_W
    x_ptrs = _pixels(x_ptr, n, x_in, offs_c, H, W, C)
    y_ptrs = _pixels(y_ptr, n, x_out, offs_c, H_out, W_out, C)
    w = _load_taps(w_ptr, offs_c, x_ptr.dtype.element_ty, C)

    y_in = first * STRIDE - PAD_H
    r0 = _load_row(x_ptrs, y_in, x_in, mask, H, W, C, WINDOW)
    r1 = r0
    if STRIDE == 1:
        r1 = _load_row(x_ptrs, y_in + 1, x_in, mask, H, W, C, WINDOW)
    for y in range(first, last):
        y_in = y * STRIDE - PAD_H
        if STRIDE == 2:
            r1 = _load_row(x_ptrs, y_in + 1, x_in, mask, H, W, C, WINDOW)
        r2 = _load_row(x_ptrs, y_in + 2, x_in, mask, H, W, C, WINDOW)
        out = y_ptrs + W_out.to(tl.int64) * C * y
        for j in tl.static_range(COLUMNS):
            total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for k in tl.static_range(3):
                total += r0[j * STRIDE + k] * w[k] + r1[j * STRIDE + k] * w[3 + k] + r2[j * STRIDE + k] * w[6 + k]
            tl.store(out + j * C, total.to(y_ptr.dtype.element_ty), mask=mask & (x_out + j < W_out)[:, None])
        if STRIDE == 1:
            r0 = r1
            r1 = r2
        else:
            r0 = r2


@triton.jit
def _store_pixel(ptrs, y, j: tl.constexpr, value, x, mask, H, W, C: tl.constexpr):
    """Store pixel (y, x + j) where it lies inside the image."""
    ok = mask & (y >= 0) & (y < H) & ((x + j >= 0) & (x + j < W))[:, None]
    tl.store(ptrs + W.to(tl.int64) * C * y + j * C, value.to(ptrs.dtype.element_ty), mask=ok)


@triton.jit
def _add(sums, T: tl.constexpr, g, x):
    """``sums`` with g x added to element T."""
    out = ()
    for t in tl.static_range(9):
        if t == T:
            out = out + (sums[t] + g * x,)
        else:
            out = out + (sums[t],)
    return out


@triton.jit
def _add_taps_1(sums, g0, g1, g2, a, j: tl.constexpr):
    """Stride 1: tap (ky, kx) joins X[i, x] to dY[i + 1 - ky, x + 1 - kx]."""
    for k in tl.static_range(3):
        sums = _add(sums, k, g2[j + 2 - k], a[j])
        sums = _add(sums, 3 + k, g1[j + 2 - k], a[j])
        sums = _add(sums, 6 + k, g0[j + 2 - k], a[j])
    return sums


@triton.jit
def _add_taps_2(sums, g1, g2, a, b, j: tl.constexpr):
    """Stride 2: an odd row (column) of X lies between two of dY, tap 2 of this and tap 0 of the next."""
    sums = _add(sums, 4, g1[j], a[2 * j])
    sums = _add(sums, 3, g1[j + 1], a[2 * j + 1])
    sums = _add(sums, 5, g1[j], a[2 * j + 1])
    sums = _add(sums, 1, g2[j], b[2 * j])
    sums = _add(sums, 7, g1[j], b[2 * j])
    sums = _add(sums, 0, g2[j + 1], b[2 * j + 1])
    sums = _add(sums, 2, g2[j], b[2 * j + 1])
    sums = _add(sums, 6, g1[j + 1], b[2 * j + 1])
    return _add(sums, 8, g1[j], b[2 * j + 1])


@triton.jit(do_not_specialize=_SIZES)
def _depthwise_bwd_kernel(
    x_ptr,
    dy_ptr,
    w_ptr,
    dx_ptr,
    partials_ptr,
    strips,
    strips_w,
    H,
    W,
    H_out,
    W_out,
    ROWS,
    chunks,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Walks down dY in steps of one row and, with it, X and dX in steps of STRIDE: row y of dY is the centre of row i of
    # X, and at stride 2 row i + 1 lies between y and y + 1. So do the columns. x_ptr and partials_ptr, or w_ptr and
    # dx_ptr, are None where that gradient is not needed.
    EXTRA_H: tl.constexpr = (STRIDE - 1) * (1 - PAD_H)  # with no zeros in front, X's first row comes before a centre
    EXTRA_W: tl.constexpr = (STRIDE - 1) * (1 - PAD_W)
    AHEAD: tl.constexpr = 2 - STRIDE  # columns and rows of dY needed before the centre
    first, last, n, x_dy, offs_c, mask = _owned(
        H_out + EXTRA_H, strips, strips_w, ROWS, chunks, C, BLOCK_M, BLOCK_C, COLUMNS
    )
    x_dy = x_dy - EXTRA_W
    x_in = x_dy * STRIDE + (1 - PAD_W)
    x_dy = x_dy - AHEAD
    dy_ptrs = _pixels(dy_ptr, n, x_dy, offs_c, H_out, W_out, C)
    WINDOW: tl.constexpr = COLUMNS + 1 + AHEAD
    if dx_ptr is not None:
        dx_ptrs = _pixels(dx_ptr, n, x_in, offs_c, H, W, C)
        w = _load_taps(w_ptr, offs_c, dy_ptr.dtype.element_ty, C)
    if x_ptr is not None:
        x_ptrs = _pixels(x_ptr, n, x_in, offs_c, H, W, C)
        sums = ()
        for _ in tl.static_range(9):
            sums = sums + (tl.zeros([BLOCK_M, BLOCK_C], tl.float32),)

    y = first - EXTRA_H
    g1 = _load_row(dy_ptrs, y, x_dy, mask, H_out, W_out, C, WINDOW)
    g0 = g1
    if STRIDE == 1:
        g0 = _load_row(dy_ptrs, y - 1, x_dy, mask, H_out, W_out, C, WINDOW)
    for step in range(first, last):
        y = step - EXTRA_H
        i = y * STRIDE + (1 - PAD_H)
        g2 = _load_row(dy_ptrs, y + 1, x_dy, mask, H_out, W_out, C, WINDOW)
        if x_ptr is not None:
            a = _load_row(x_ptrs, i, x_in, mask, H, W, C, COLUMNS * STRIDE)
            if STRIDE == 2:
                b = _load_row(x_ptrs, i + 1, x_in, mask, H, W, C, COLUMNS * STRIDE)
        for j in tl.static_range(COLUMNS):
            if STRIDE == 1:
                if x_ptr is not None:
                    sums = _add_taps_1(sums, g0, g1, g2, a, j)
                if dx_ptr is not None:
                    d = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
                    for k in tl.static_range(3):
                        d += g2[j + 2 - k] * w[k] + g1[j + 2 - k] * w[3 + k] + g0[j + 2 - k] * w[6 + k]
                    _store_pixel(dx_ptrs, i, j, d, x_in, mask, H, W, C)
            else:
                if x_ptr is not None:
                    sums = _add_taps_2(sums, g1, g2, a, b, j)
                if dx_ptr is not None:
                    d00 = g1[j] * w[4]
                    d01 = g1[j + 1] * w[3] + g1[j] * w[5]
                    d10 = g2[j] * w[1] + g1[j] * w[7]
                    d11 = g2[j + 1] * w[0] + g2[j] * w[2] + g1[j + 1] * w[6] + g1[j] * w[8]
                    _store_pixel(dx_ptrs, i, 2 * j, d00, x_in, mask, H, W, C)
                    _store_pixel(dx_ptrs, i, 2 * j + 1, d01, x_in, mask, H, W, C)
                    _store_pixel(dx_ptrs, i + 1, 2 * j, d10, x_in, mask, H, W, C)
                    _store_pixel(dx_ptrs, i + 1, 2 * j + 1, d11, x_in, mask, H, W, C)
        if STRIDE == 1:
            g0 = g1
        g1 = g2
    if x_ptr is not None:
        out = partials_ptr + tl.program_id(0).to(tl.int64) * 9 * C + offs_c
        for t in tl.static_range(9):
            tl.store(out + t * C, tl.sum(sums[t], axis=0), mask=offs_c < C)


@functools.lru_cache(maxsize=1024)  # a server's shapes may never end
def _walk(
    x_shape: tuple[int, ...], stride: int, padding: str, tile: tiles.DepthwiseTile, processors: int, *, backward: bool
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes by name of a launch over images of ``x_shape [N, C, H, W]``.

    Remembered, as it takes longer than the launch itself.
    """
    N, C, H, W = x_shape
    H_out, W_out = cdiv(H, stride), cdiv(W, stride)
    pad_h, pad_w = front_padding(H, stride, padding), front_padding(W, stride, padding)
    rows, columns = (H_out + 1 - pad_h, W_out + 1 - pad_w) if backward else (H_out, W_out)
    strips_w = cdiv(columns, tile.COLUMNS)
    if N * strips_w >= 2**31:
        raise ValueError(f"x: expected fewer than 2^31 strips of {tile.COLUMNS} columns, got shape {x_shape}")
    groups, blocks_c = cdiv(N * strips_w, tile.BLOCK_M), cdiv(C, tile.BLOCK_C)
    ROWS = tiles.depthwise_rows(rows, groups * blocks_c, tile.num_warps, processors)
    chunks = cdiv(rows, ROWS)
    sizes = dict(strips=N * strips_w, strips_w=strips_w, H=H, W=W, H_out=H_out, W_out=W_out, ROWS=ROWS, chunks=chunks)
    constants = dict(C=C, STRIDE=stride, PAD_H=pad_h, PAD_W=pad_w)
    blocks = dict(BLOCK_M=tile.BLOCK_M, BLOCK_C=tile.BLOCK_C, COLUMNS=tile.COLUMNS)
    return (groups * chunks, blocks_c), {**sizes, **constants, **blocks}


def _tile(x: Tensor, stride: int, limits: common.Limits, *, backward: bool) -> tiles.DepthwiseTile:
    width = cdiv(x.shape[3], stride)
    return tiles.depthwise_tile(x.shape[1], stride, width, x.element_size(), limits, backward=backward)


def depthwise_fwd_launch(x: Tensor, weight: Tensor, y: Tensor, stride: int, padding: str) -> Launch:
    """Convolve ``x [N, C, H, W]`` with ``weight [C, 1, 3, 3]`` into ``y [N, C, H_out, W_out]``.

    A program owns BLOCK_M strips of COLUMNS output columns, ROWS output rows and BLOCK_C channels.
    """
    limits = common.limits(x.device)
    tile = _tile(x, stride, limits, backward=False)
    grid, sizes = _walk(tuple(x.shape), stride, padding, tile, limits.processors, backward=False)
    arguments = dict(x_ptr=x, w_ptr=weight, y_ptr=y, **sizes)
    return Launch(_depthwise_fwd_kernel, grid, arguments, tile.num_warps, spill_bytes=tile.spill_bytes)


def depthwise_fwd_bytes(x: Tensor, weight: Tensor, y: Tensor, stride: int, padding: str) -> Traffic:
    """Bytes of ``depthwise_fwd_launch``: a program reads its rows and columns with a halo of one on each side."""
    launch = depthwise_fwd_launch(x, weight, y, stride, padding)
    at = launch.arguments
    (N, C, H, W), (H_out, step) = x.shape, (y.shape[2], stride * at["COLUMNS"])
    top, left = -at["PAD_H"], -at["PAD_W"]
    rows = covered(
        range(top, top + H_out * stride, at["ROWS"] * stride),
        (at["ROWS"] - 1) * stride + 3,
        min(H, top + (H_out - 1) * stride + 3),
    )
    columns = covered(range(left, left + at["strips_w"] * step, step), step - stride + 3, W)
    loaded = N * rows * columns * C * x.element_size() + launch.grid[0] * weight.nbytes
    return Traffic(x.nbytes + weight.nbytes, y.nbytes, loaded, y.nbytes)


def depthwise_bwd_launch(
    dy: Tensor, x: Tensor | None, weight: Tensor, dx: Tensor | None, stride: int, padding: str
) -> Launch:
    """Gradients of a convolution of which ``dy [N, C, H_out, W_out]`` is the output's.

    With ``dx [N, C, H, W]``, the input's is written there; with ``x``, the weight's is left as the launch's argument
    ``partials_ptr [programs, 9, C]``, fp32 for ``sum_partials``; with both, in one pass. A program owns BLOCK_M strips
    of COLUMNS columns and ROWS rows of dY, the STRIDE times as many of X and dX that belong to them, BLOCK_C channels.
    """
    image = x if dx is None else dx
    assert image is not None
    limits = common.limits(dy.device)
    tile = _tile(image, stride, limits, backward=True)
    grid, sizes = _walk(tuple(image.shape), stride, padding, tile, limits.processors, backward=True)
    arguments = dict(
        x_ptr=x,
        dy_ptr=dy,
        w_ptr=None if dx is None else weight,
        dx_ptr=dx,
        partials_ptr=None if x is None else common.allocate((grid[0], 9, dy.shape[1]), dy, torch.float32),
        **sizes,
    )
    return Launch(_depthwise_bwd_kernel, grid, arguments, tile.num_warps, spill_bytes=tile.spill_bytes)


def depthwise_bwd_bytes(
    dy: Tensor, x: Tensor | None, weight: Tensor, dx: Tensor | None, stride: int, padding: str
) -> Traffic:
    """Bytes of ``depthwise_bwd_launch``: dY with a halo, X and dX without, each program's partial sums."""
    launch = depthwise_bwd_launch(dy, x, weight, dx, stride, padding)
    at = launch.arguments
    N, C, H_out, W_out = dy.shape
    ahead = 2 - stride
    top, left = ((stride - 1) * (at[pad] - 1) - ahead for pad in ("PAD_H", "PAD_W"))
    rows = covered(range(top, H_out - ahead, at["ROWS"]), at["ROWS"] + 1 + ahead, H_out)
    columns = covered(
        range(left, left + at["strips_w"] * at["COLUMNS"], at["COLUMNS"]), at["COLUMNS"] + 1 + ahead, W_out
    )
    traffic = Traffic(dy.nbytes, 0, N * rows * columns * C * dy.element_size(), 0)
    if dx is not None:
        traffic += Traffic(weight.nbytes, dx.nbytes, launch.grid[0] * weight.nbytes, dx.nbytes)
    if x is not None:
        partials = at["partials_ptr"].nbytes
        traffic += Traffic(x.nbytes, partials, x.nbytes, partials)
    return traffic
