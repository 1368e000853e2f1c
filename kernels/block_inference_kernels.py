"""Inverted residual at inference, the kernels: the whole block in one, or in two with B stored between them.

    A = relu6(X W1 + b1),  B = relu6(depthwise3x3(A) + bd),  Y = B W2 + b2 (+ X)

with BatchNorm folded into weights and biases, and A and B held at a sixth of themselves (``pack.py``), so that ReLU6 is
a clamp to [0, 1]. In one kernel neither A nor B reaches device memory: X is read and Y written once.

A *micro-tile* is TILE_H x TILE_W pixels of the output. A program owns BLOCK_M micro-tiles and all channels, and goes
through c_mid in steps of BLOCK_E. A pixel of the micro-tile, or of its halo in X, is one [BLOCK_M, .] register tile of
a tuple, one row for each micro-tile: a shift in x or y is another element of the tuple, and no pixel is shared between
threads. The halo is expanded again by each micro-tile that it touches. Columns of the halo are outside and rows inside,
so that only 3 TILE_H depthwise sums are alive at a time; [BLOCK_M, c_out] sums of each output pixel stay in registers,
c_out in pieces of BLOCK_O.

H and W are known to the compiler: offsets of pixels are immediates, and a bound that can't fail is no code. What is
read of X doesn't depend on the channels of the loop: it is read once, and the compiler keeps it in shared memory.

Zero padding applies to A. X is 0 outside the image and b1 is multiplied by 0 there, so A is exactly 0.

Precision: X, W1, W2, B and Y in fp16, bf16 or fp32; Wd and biases in fp32; A, all sums and the residual's addition in
fp32. B is rounded once, as the operand of the product. In fp32 the products are IEEE or TF32, as PRECISION says.
The hardware's clamp turns NaN into 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Geometry:
    """Where micro-tiles of TILE_H x TILE_W output pixels lie on an image, and their halos of ``rows x columns`` pixels.

    A halo's rows before ``top`` and from ``bottom`` on, and its columns before ``left`` and from ``right`` on, may lie
    outside the image; in an image of one micro-tile they always do.
    """

    H: int
    W: int
    H_out: int
    W_out: int
    rows: int
    columns: int
    tiles_h: int
    tiles_w: int
    top: int
    left: int
    bottom: int
    right: int


@triton.constexpr_function
def geometry(H: int, W: int, STRIDE: int, PAD_H: int, PAD_W: int, TILE_H: int, TILE_W: int) -> Geometry:
    """Geometry of an image of ``H x W`` pixels with PAD_H rows and PAD_W columns of zeros in front."""
    H_out, W_out = -(-H // STRIDE), -(-W // STRIDE)
    tiles_h, tiles_w = -(-H_out // TILE_H), -(-W_out // TILE_W)
    return Geometry(
        H=H,
        W=W,
        H_out=H_out,
        W_out=W_out,
        rows=(TILE_H - 1) * STRIDE + 3,
        columns=(TILE_W - 1) * STRIDE + 3,
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        top=PAD_H,
        left=PAD_W,
        bottom=H + PAD_H - (tiles_h - 1) * TILE_H * STRIDE,
        right=W + PAD_W - (tiles_w - 1) * TILE_W * STRIDE,
    )


@triton.constexpr_function
def _may_leave(g: Geometry, r: int, c: int) -> bool:
    """Whether pixel (r, c) of a halo can lie outside the image."""
    return r < g.top or r >= g.bottom or c < g.left or c >= g.right


@triton.constexpr_function
def _never_inside(g: Geometry, r: int, c: int) -> bool:
    """Whether pixel (r, c) of a halo always lies outside the image."""
    rows_leave, columns_leave = r < g.top or r >= g.bottom, c < g.left or c >= g.right
    return (g.tiles_h == 1 and rows_leave) or (g.tiles_w == 1 and columns_leave)


@triton.constexpr_function
def _has_tap(r: int, c: int, ky: int, kx: int, STRIDE: int, TILE_H: int, TILE_W: int) -> bool:
    """Whether pixel (r, c) of a halo meets tap (ky, kx) of a pixel of the micro-tile."""
    y, x = r - ky, c - kx
    return y % STRIDE == 0 and x % STRIDE == 0 and 0 <= y // STRIDE < TILE_H and 0 <= x // STRIDE < TILE_W


@triton.constexpr_function
def _partial(size: int, block: int) -> bool:
    """Whether the last of the blocks that cover ``size`` isn't full."""
    return size % block != 0


@triton.jit
def _replaced(items, i: tl.constexpr, item):
    """The tuple with another i-th element."""
    out = ()
    for k in tl.static_range(len(items)):
        if k == i:
            out = out + (item,)
        else:
            out = out + (items[k],)
    return out


@triton.jit
def _clamp(z):
    return tl.minimum(tl.maximum(z, 0.0), 1.0)  # the assembler folds it into the addition before


@triton.jit
def _load(ptrs, rows, columns, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Tile at ``ptrs [R, C]``, 0 where ``rows [R]`` or ``columns [C]`` is false, as far as they are to be checked."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(ptrs, mask=columns[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _vector(ptr, offs, SIZE: tl.constexpr):
    """``[1, BLOCK]`` of an fp32 vector; 0 from SIZE on, where BLOCK doesn't divide it."""
    if _partial(SIZE, offs.shape[0]):
        return tl.load(ptr + offs, mask=offs < SIZE, other=0.0)[None, :]
    else:
        return tl.load(ptr + offs)[None, :]


@triton.jit
def _inside(g: tl.constexpr, y, x, r: tl.constexpr, c: tl.constexpr):
    """``[BLOCK_M]``: whether pixel (r, c) of the halo from (y, x) on lies in the image."""
    inside = y == y
    if r < g.top:
        inside = inside & (y + r >= 0)
    if r >= g.bottom:
        inside = inside & (y + r < g.H)
    if c < g.left:
        inside = inside & (x + c >= 0)
    if c >= g.right:
        inside = inside & (x + c < g.W)
    return inside


@triton.jit
def _pixel(g: tl.constexpr, x_ptrs, y, x, r: tl.constexpr, c: tl.constexpr, offs, C: tl.constexpr):
    """``[BLOCK_M, BLOCK]``: channels ``offs`` of X at pixel (r, c) of each halo, 0 outside the image and from C on."""
    ptrs = x_ptrs + ((r * g.W + c) * C + offs)[None, :]
    return _load(ptrs, _inside(g, y, x, r, c), offs < C, _may_leave(g, r, c), _partial(C, offs.shape[0]))


@triton.jit
def _add_taps(
    d, a, wd, r: tl.constexpr, c: tl.constexpr, STRIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """The sums ``d`` of a micro-tile, with what pixel (r, c) of its halo adds to each."""
    for ky in tl.static_range(3):
        for kx in tl.static_range(3):
            if _has_tap(r, c, ky, kx, STRIDE, TILE_H, TILE_W):
                d = _replaced(
                    d,
                    (r - ky) // STRIDE * TILE_W + (c - kx) // STRIDE,
                    d[(r - ky) // STRIDE * TILE_W + (c - kx) // STRIDE] + wd[3 * ky + kx] * a,
                )
    return d


@triton.jit
def _weight(ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[R, C]`` of the transpose of a matrix ``[COLUMNS, ROWS]``, 0 from ROWS and COLUMNS on."""
    ptrs = ptr + rows[:, None] + columns[None, :] * ROWS
    r_partial: tl.constexpr = _partial(ROWS, rows.shape[0])
    c_partial: tl.constexpr = _partial(COLUMNS, columns.shape[0])
    return _load(ptrs, rows < ROWS, columns < COLUMNS, r_partial, c_partial)


@triton.jit
def _tiles_of_x(
    g: tl.constexpr, x_ptrs, y, x, r: tl.constexpr, c: tl.constexpr, C_IN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """All channels of X at pixel (r, c) of each halo, in tiles ``[BLOCK_M, BLOCK_K]``."""
    tiles_of_x = ()
    for k in tl.static_range(0, C_IN, BLOCK_K):
        tiles_of_x = tiles_of_x + (_pixel(g, x_ptrs, y, x, r, c, k + tl.arange(0, BLOCK_K), C_IN),)
    return tiles_of_x


@triton.jit
def _product(tiles_of_x, first: tl.constexpr, w1, PRECISION: tl.constexpr):
    """``[BLOCK_M, BLOCK_E]``: tiles of X from ``first`` on times the tiles of W1."""
    z = tl.zeros([tiles_of_x[first].shape[0], w1[0].shape[1]], tl.float32)
    for k in tl.static_range(len(w1)):
        z = tl.dot(tiles_of_x[first + k], w1[k], z, input_precision=PRECISION)
    return z


@triton.jit
def _add_products(sums, first: tl.constexpr, b, w2, PRECISION: tl.constexpr):
    """The sums of a micro-tile, with ``b`` times the tiles of W2 added to those from ``first`` on."""
    for o in tl.static_range(len(w2)):
        sums = _replaced(sums, first + o, tl.dot(b, w2[o], sums[first + o], input_precision=PRECISION))
    return sums


@triton.jit
def _looped_products(
    g: tl.constexpr,
    x_ptrs,
    w1_ptr,
    y,
    x,
    offs_e,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X W1 of every pixel of the halo, in a loop over c_in: for any width, where tiles of all of X would not fit."""
    ROWS: tl.constexpr = g.rows
    COLUMNS: tl.constexpr = g.columns
    products = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        products = products + (tl.zeros([y.shape[0], offs_e.shape[0]], tl.float32),)
    for k in range(0, C_IN, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w1 = _weight(w1_ptr, offs_k, offs_e, C_IN, C_MID)
        for c in tl.static_range(COLUMNS):
            for r in tl.static_range(ROWS):
                pixel = _pixel(g, x_ptrs, y, x, r, c, offs_k, C_IN)
                z = tl.dot(pixel, w1, products[c * ROWS + r], input_precision=PRECISION)
                products = _replaced(products, c * ROWS + r, z)
    return products


@triton.jit
def _activated(g: tl.constexpr, z, b1, y, x, r: tl.constexpr, c: tl.constexpr):
    """A at pixel (r, c) of each halo from its product ``z``: exactly 0 outside the image, where X and so z are."""
    if _may_leave(g, r, c):
        inside = _inside(g, y, x, r, c).to(tl.float32)[:, None]
        zeros = tl.zeros(z.shape, tl.float32)
        return _clamp(tl.fma(zeros + inside, zeros + b1, z))
    else:
        return _clamp(z + b1)


@triton.jit
def _residual(ptrs, mask, RELU6_INPUT: tl.constexpr):
    """X at the pixel of the output, in fp32."""
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if RELU6_INPUT:
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    return x


@triton.jit
def _store(g: tl.constexpr, ptr, residual_ptr, value, owned, n, y, x, offs, C: tl.constexpr, RELU6_INPUT: tl.constexpr):
    """Channels ``offs`` of output pixel (y, x) of each micro-tile, plus the residual's if there is one."""
    at = (((n * g.H_out + y) * g.W_out + x).to(tl.int64) * C)[:, None] + offs[None, :]
    mask = (owned & (y < g.H_out) & (x < g.W_out))[:, None] & (offs < C)[None, :]
    if residual_ptr is not None:
        value += _residual(residual_ptr + at, mask, RELU6_INPUT)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["micro_tiles"])
def inverted_residual_kernel(
    x_ptr,
    w1_ptr,
    b1_ptr,
    wd_ptr,
    bd_ptr,
    w2_ptr,
    b2_ptr,
    y_ptr,
    micro_tiles,
    H: tl.constexpr,
    W: tl.constexpr,
    C_IN: tl.constexpr,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU6_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """A program owns BLOCK_M micro-tiles of Y. Without W2, y_ptr is B's, and it owns BLOCK_E channels of them."""
    g: tl.constexpr = geometry(H, W, STRIDE, PAD_H, PAD_W, TILE_H, TILE_W)
    ROWS: tl.constexpr = g.rows
    COLUMNS: tl.constexpr = g.columns
    K_BLOCKS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K if w1_ptr is not None and not LOOPED else 0
    O_BLOCKS: tl.constexpr = (C_OUT + BLOCK_O - 1) // BLOCK_O if w2_ptr is not None else 0
    owned = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.minimum(owned, micro_tiles - 1)  # behind the last it is computed again, and not stored
    n = tile // (g.tiles_h * g.tiles_w)
    y_out, x_out = tile // g.tiles_w % g.tiles_h * TILE_H, tile % g.tiles_w * TILE_W
    y, x = y_out * STRIDE - PAD_H, x_out * STRIDE - PAD_W
    x_ptrs = x_ptr + (((n * H + y) * W + x).to(tl.int64) * C_IN)[:, None]
    offs_k, offs_o = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_O)
    halo = ()
    if K_BLOCKS and O_BLOCKS:  # once, for all channels of the loop
        for c in tl.static_range(COLUMNS):
            for r in tl.static_range(ROWS):
                halo = halo + _tiles_of_x(g, x_ptrs, y, x, r, c, C_IN, BLOCK_K)
    b2, sums = (), ()
    for o in tl.static_range(O_BLOCKS):
        b2 = b2 + (_vector(b2_ptr, o * BLOCK_O + offs_o, C_OUT),)
    for i in tl.static_range(TILE_H * TILE_W * O_BLOCKS):
        sums = sums + (tl.zeros([BLOCK_M, BLOCK_O], tl.float32) + b2[i % O_BLOCKS],)
    first = 0 if O_BLOCKS else tl.program_id(1) * BLOCK_E
    for e in range(first, C_MID if O_BLOCKS else first + BLOCK_E, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        w1, w2, wd, d = (), (), (), ()
        for k in tl.static_range(K_BLOCKS):
            w1 = w1 + (_weight(w1_ptr, k * BLOCK_K + offs_k, offs_e, C_IN, C_MID),)
        for o in tl.static_range(O_BLOCKS):
            w2 = w2 + (_weight(w2_ptr, offs_e, o * BLOCK_O + offs_o, C_MID, C_OUT),)
        for k in tl.static_range(9):
            wd = wd + (_vector(wd_ptr + k * C_MID, offs_e, C_MID),)
        if w1_ptr is not None:
            b1 = _vector(b1_ptr, offs_e, C_MID)
        if LOOPED:
            products = _looped_products(g, x_ptrs, w1_ptr, y, x, offs_e, C_IN, C_MID, BLOCK_K, PRECISION)
        bd = _vector(bd_ptr, offs_e, C_MID)
        for _ in tl.static_range(TILE_H * TILE_W):
            d = d + (tl.zeros([BLOCK_M, BLOCK_E], tl.float32) + bd,)
        for c in tl.static_range(COLUMNS):
            for r in tl.static_range(ROWS):
                if not _never_inside(g, r, c):
                    if w1_ptr is None:
                        a = _pixel(g, x_ptrs, y, x, r, c, offs_e, C_MID).to(tl.float32)
                        if RELU6_INPUT:
                            a = tl.minimum(tl.maximum(a, 0.0), 6.0)
                    elif LOOPED:
                        a = _activated(g, products[c * ROWS + r], b1, y, x, r, c)
                    elif O_BLOCKS:
                        a = _activated(g, _product(halo, (c * ROWS + r) * K_BLOCKS, w1, PRECISION), b1, y, x, r, c)
                    else:
                        tiles_of_x = _tiles_of_x(g, x_ptrs, y, x, r, c, C_IN, BLOCK_K)
                        a = _activated(g, _product(tiles_of_x, 0, w1, PRECISION), b1, y, x, r, c)
                    d = _add_taps(d, a, wd, r, c, STRIDE, TILE_H, TILE_W)
            if c >= 2 and (c - 2) % STRIDE == 0:  # a column of the micro-tile is complete
                for t in tl.static_range(TILE_H):
                    b = _clamp(d[t * TILE_W + (c - 2) // STRIDE]).to(x_ptr.dtype.element_ty)
                    if O_BLOCKS:
                        sums = _add_products(sums, (t * TILE_W + (c - 2) // STRIDE) * O_BLOCKS, b, w2, PRECISION)
                    else:
                        x_at = x_out + (c - 2) // STRIDE
                        _store(g, y_ptr, None, b, owned < micro_tiles, n, y_out + t, x_at, offs_e, C_MID, False)
    for i in tl.static_range(TILE_H * TILE_W * O_BLOCKS):
        y_at, x_at = y_out + i // O_BLOCKS // TILE_W, x_out + i // O_BLOCKS % TILE_W
        offs = i % O_BLOCKS * BLOCK_O + offs_o
        residual_ptr = x_ptr if RESIDUAL else None
        _store(g, y_ptr, residual_ptr, sums[i], owned < micro_tiles, n, y_at, x_at, offs, C_OUT, RELU6_INPUT)


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    b_ptr,
    w2_ptr,
    b2_ptr,
    residual_ptr,
    y_ptr,
    M,
    C_MID: tl.constexpr,
    C_OUT: tl.constexpr,
    RELU6_INPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Y = B W2 + b2 (+ residual): a program owns BLOCK_M of the M pixels of Y, and BLOCK_O channels."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = tl.minimum(offs_m, M - 1).to(tl.int64)[:, None]  # behind the last it is computed again, and not stored
    sums = tl.zeros([BLOCK_M, BLOCK_O], tl.float32) + _vector(b2_ptr, offs_o, C_OUT)
    for k in range(0, C_MID, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        b = _load(b_ptr + pixel * C_MID + offs_k[None, :], offs_m < M, offs_k < C_MID, False, _partial(C_MID, BLOCK_K))
        sums = tl.dot(b, _weight(w2_ptr, offs_k, offs_o, C_MID, C_OUT), sums, input_precision=PRECISION)
    at = pixel * C_OUT + offs_o[None, :]
    mask = (offs_m < M)[:, None] & (offs_o < C_OUT)[None, :]
    if residual_ptr is not None:
        sums += _residual(residual_ptr + at, mask, RELU6_INPUT)
    tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), mask=mask)
