"""Register tiles of the passes that walk down an image with a block of channels (``walks.py``), and of ``project.py``.

A tile is [BLOCK_E channels, pixels], channels along the rows of the matrix product. BLOCK_S *strips* (an image and a
block of COLUMNS columns of it) are a column of BLOCK_S pixels, one from each strip. With 8 strips a warp's 16 channels
by 8 pixels are four registers of a product's accumulator: a thread holds two channels, so that nine taps are 18
registers.

What is loaded and multiplied is *wide*, WIDE such columns side by side: one load, one barrier and one product for all.
Then it is parted into a tuple of narrow tiles, which is renaming registers, as each thread holds whole columns. A shift
in x is the next element of the tuple.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


@triton.constexpr_function
def needs_mask(k: int, C: int, BLOCK: int) -> bool:
    """Whether block k of an operand's C channels reaches beyond them, where ``surplus_again`` doesn't help."""
    return (k + 1) * BLOCK > C and (C > BLOCK or C % 8 != 0)


@triton.jit
def zeros(n: tl.constexpr, BLOCK_E: tl.constexpr, PIXELS: tl.constexpr):
    """A tuple of n tiles of zeros."""
    out = ()
    for _ in tl.static_range(n):
        out = out + (tl.zeros([BLOCK_E, PIXELS], tl.float32),)
    return out


@triton.jit
def _halved(tiles, n: tl.constexpr, BLOCK_E: tl.constexpr, PIXELS: tl.constexpr):
    """Each of n tiles [BLOCK_E, PIXELS] as two."""
    out = ()
    for i in tl.static_range(n):
        left, right = tl.split(tl.permute(tl.reshape(tiles[i], [BLOCK_E, 2, PIXELS // 2]), [0, 2, 1]))
        out = out + (left, right)
    return out


@triton.jit
def parted(wide, n: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_E, n BLOCK_S] as a tuple of n tiles [BLOCK_E, BLOCK_S]; n is 1, 2, 4 or 8."""
    tiles = (wide,)
    if n >= 2:
        tiles = _halved(tiles, 1, BLOCK_E, n * BLOCK_S)
    if n >= 4:
        tiles = _halved(tiles, 2, BLOCK_E, n * BLOCK_S // 2)
    if n >= 8:
        tiles = _halved(tiles, 4, BLOCK_E, n * BLOCK_S // 4)
    return tiles


@triton.jit
def _paired(tiles, n: tl.constexpr, BLOCK_E: tl.constexpr, PIXELS: tl.constexpr):
    """Of n tiles [BLOCK_E, PIXELS] each two side by side as one."""
    out = ()
    for i in tl.static_range(n // 2):
        pair = tl.permute(tl.join(tiles[2 * i], tiles[2 * i + 1]), [0, 2, 1])
        out = out + (tl.reshape(pair, [BLOCK_E, 2 * PIXELS]),)
    return out


@triton.jit
def joined(tiles, n: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):
    """A tuple of n tiles [BLOCK_E, BLOCK_S] as one, [BLOCK_E, n BLOCK_S]; n is 1, 2, 4 or 8."""
    if n >= 2:
        tiles = _paired(tiles, n, BLOCK_E, BLOCK_S)
    if n >= 4:
        tiles = _paired(tiles, n // 2, BLOCK_E, 2 * BLOCK_S)
    if n >= 8:
        tiles = _paired(tiles, n // 4, BLOCK_E, 4 * BLOCK_S)
    return tiles[0]


@triton.jit
def replaced(items, i: tl.constexpr, item, n: tl.constexpr):
    """The tuple of n with another i-th element."""
    out = ()
    for k in tl.static_range(n):
        if k == i:
            out = out + (item,)
        else:
            out = out + (items[k],)
    return out


@triton.jit
def load_channels(ptr, offs, mask, MASKED: tl.constexpr):
    """A number of each channel as a column [BLOCK_E, 1] in fp32."""
    if MASKED:
        values = tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        values = tl.load(ptr + offs)
    return values.to(tl.float32)[:, None]


@triton.jit
def load_masked(ptrs, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile, 0 outside; with only the masks that can fail."""
    if MASK_ROWS and MASK_COLUMNS:
        tile = tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        tile = tl.load(ptrs, mask=columns[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def surplus_again(offs, C: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets along C of an operand that is BLOCK wide: what is beyond C reads its last eight channels again.

    Their weights are 0, and the load needs no mask.
    """
    if C < BLOCK and C % 8 == 0:
        offs = tl.max_contiguous(tl.multiple_of(tl.where(offs < C, offs, C - 8 + offs % 8), 8), 8)
    return offs


@triton.jit
def store_masked(ptrs, tile, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """Store a tile, with only the masks that can fail."""
    if MASK_ROWS and MASK_COLUMNS:
        tl.store(ptrs, tile, mask=rows[:, None] & columns[None, :])
    elif MASK_ROWS:
        tl.store(ptrs, tile, mask=rows[:, None])
    elif MASK_COLUMNS:
        tl.store(ptrs, tile, mask=columns[None, :])
    else:
        tl.store(ptrs, tile)


@triton.jit
def load_weight(
    ptr,
    offs_e,
    stride_e,
    offs_c,
    stride_c,
    C: tl.constexpr,
    mask_e,
    MASK_E: tl.constexpr,
    n: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tuple of n tiles [BLOCK_E, BLOCK] of a matrix, side by side along C, as they are in memory; 0 outside."""
    tiles = ()
    for k in tl.static_range(n):
        offs = k * BLOCK + offs_c
        ptrs = ptr + offs_e[:, None] * stride_e + offs[None, :] * stride_c
        tiles = tiles + (load_masked(ptrs, mask_e, offs < C, MASK_E, (k + 1) * BLOCK > C),)
    return tiles


@triton.jit
def product(
    weights,
    ptrs,
    inside,
    offs_c,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIXELS: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights [BLOCK_E, C] times the pixels [C, PIXELS] that ``ptrs`` point to, of which the first BLOCK are there."""
    out = tl.zeros([BLOCK_E, PIXELS], tl.float32)
    for k in tl.static_range(blocks(C, BLOCK)):
        tile = load_masked(ptrs + k * BLOCK, k * BLOCK + offs_c < C, inside, needs_mask(k, C, BLOCK), CHECK)
        out = tl.dot(weights[k], tile, out, input_precision=PRECISION)
    return out


@triton.jit
def identity(BLOCK_E: tl.constexpr, dtype: tl.constexpr):
    """The matrix that leaves a product as it is."""
    offs = tl.arange(0, BLOCK_E)
    return (offs[:, None] == offs[None, :]).to(dtype)


@triton.jit
def load_exact(eye, ptrs, mask_e, inside, MASK_E: tl.constexpr, CHECK: tl.constexpr):
    """Pixels [BLOCK_E, PIXELS] in fp32. A product with the identity is exact in half precision, and what it leaves lies
    as other products do, where a conversion would go through shared memory.
    """
    tile = load_masked(ptrs, mask_e, inside, MASK_E, CHECK)
    if eye.dtype != tl.float32:
        tile = tl.dot(eye, tile, tl.zeros(tile.shape, tl.float32))
    return tile


@triton.jit
def hide_join(tile, ASSEMBLY: tl.constexpr):
    """The tile itself. It keeps the compiler from taking it for four elements wide as an operand of a product, as
    ``tl.join`` makes it do, and from shuffling every fragment.
    """
    if ASSEMBLY:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, False, 1)
    return tile


def operand_bytes(C: int, BLOCK: int, element_size: int) -> int:
    """Bytes that a product requests of a pixel's C channels, surplus included."""
    return (BLOCK if C < BLOCK and C % 8 == 0 else C) * element_size
