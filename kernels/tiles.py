"""Block sizes as data: which tile a kernel takes for a shape, and why.

A tile is chosen by channels and width, and how far a program walks by whether the grid fills the device. Neither is
tuned by batch. Rows are compiled ahead of time by ``python -m bench.aot``, which
fails where one spills more than it declares.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

from .common import Limits, cdiv

RECORD = Path(__file__).with_name("tiles.json")  # written by `python -m bench.aot --all`


class DepthwiseTile(NamedTuple):
    """BLOCK_M strips of COLUMNS columns by BLOCK_C channels a program."""

    BLOCK_M: int
    BLOCK_C: int
    COLUMNS: int
    num_warps: int = 4
    spill_bytes: int = 0


# BLOCK_M * BLOCK_C = 128 * num_warps gives a thread four channels of a strip: loads of 8 bytes in half precision, nine
# taps in 36 registers, nine sums in another 36. At stride 1 four columns read six where two read four: a tenth fewer
# instructions and a quarter fewer requests an element, and just no spill (both gradients: 219 to 254 registers).
# Four warps, as every program writes nine partial sums a channel: two would double those bytes.
DEPTHWISE = (
    DepthwiseTile(8, 64, 4),  # wide rows of memory
    DepthwiseTile(16, 32, 4),  # c_mid of 32, 96, 288: 64 would idle a quarter of the lanes and more
    DepthwiseTile(32, 16, 4),  # c_mid of 16, 48, 144, 240; a pixel is still a whole sector of 32 bytes
    DepthwiseTile(8, 64, 2),  # where four columns would idle in the last strip: 1, 2, 5, 6, 9, 10 wide
    DepthwiseTile(16, 32, 2),
    DepthwiseTile(32, 16, 2),
)
WARPS_PER_PROCESSOR = 16  # twice what the registers of both gradients let reside; more would be more partial sums
MIN_ROWS = 8  # under it a walk reads more than a quarter again of its rows as halo


def depthwise_tile(C: int, width: int) -> DepthwiseTile:
    """Tile for C channels and ``width`` output columns: the one that pads C least, of these the widest."""
    columns = 2 if 1.15 * 2 * cdiv(width, 2) < 4 * cdiv(width, 4) else 4
    rows = [tile for tile in DEPTHWISE if columns == tile.COLUMNS]
    return min(rows, key=lambda tile: (cdiv(C, tile.BLOCK_C) * tile.BLOCK_C, -tile.BLOCK_C))


def depthwise_rows(rows: int, programs: int, num_warps: int, processors: int) -> int:
    """Rows that a program walks down, where ``programs`` side by side cover the other dimensions.

    A walk reads two rows of halo, so it is as long as it can be while the grid gives each of ``processors`` its warps.
    """
    chunks = min(cdiv(WARPS_PER_PROCESSOR * processors, max(programs, 1) * num_warps), cdiv(rows, MIN_ROWS))
    return cdiv(rows, chunks)


class BlockTile(NamedTuple):
    """BLOCK_M micro-tiles of TILE_H x TILE_W output pixels a program, c_mid in steps of BLOCK_E, c_out of BLOCK_O."""

    TILE_H: int
    TILE_W: int
    BLOCK_M: int
    BLOCK_E: int
    BLOCK_O: int
    num_warps: int
    num_stages: int = 1
    spill_bytes: int = 0
    split: bool = False  # two kernels, with B stored between them
    looped: bool = False  # and X read in a loop over c_in

    def fitted(self, H_out: int, W_out: int) -> BlockTile:
        """The same for an image of ``H_out x W_out`` pixels, which it cuts into equal parts."""
        tile_h = cdiv(H_out, cdiv(H_out, self.TILE_H))
        return self._replace(TILE_H=tile_h, TILE_W=cdiv(W_out, cdiv(W_out, self.TILE_W)))

    def shared_bytes(self, c_in: int, c_out: int, stride: int, element_size: int) -> int:
        """Shared memory of a program at most: the halo of X, which stays, and weights on their way to registers."""
        rows, columns = ((tile - 1) * stride + 3 for tile in (self.TILE_H, self.TILE_W))
        halo = 0 if self.split else rows * columns * self.BLOCK_M * cdiv(c_in, block_k(c_in)) * block_k(c_in)
        weights = self.BLOCK_E * (min(c_in, BLOCK_K) if self.looped else c_in)
        weights += 0 if self.split else self.BLOCK_E * c_out
        return (halo + weights) * element_size + 8192


class ProjectTile(NamedTuple):
    """BLOCK_M pixels by BLOCK_O channels a program, c_mid in steps of BLOCK_K."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    spill_bytes: int = 0


class HeadTile(NamedTuple):
    """An image and BLOCK_O channels a program, which walks over BLOCK_P pixels and BLOCK_K channels of X at a time."""

    BLOCK_P: int
    BLOCK_O: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    spill_bytes: int = 0


# A warp multiplies 16 micro-tiles at a time. With c_out of at most 32 it has 16 channels of c_mid and the sums of all
# of c_out to itself; a larger c_out is dealt out to four warps, each with 16 of 64 channels. In two stages the weights
# of the next step are on their way during this one, and fewer registers spill. Most rows use all 255 registers: what
# spills are invariants of the loop, and a smaller micro-tile would expand more of its halo again. ``spill_bytes``
# covers all shapes and capabilities; the largest, 252, is SHRINKING's on sm_100. The last row of a group is for small
# grids, for devices with little shared memory, and for fp32 (TF32), where SPLIT's spills 228 bytes.
NARROW = (
    BlockTile(2, 4, 16, 16, 8, num_warps=1, num_stages=2, spill_bytes=192),
    BlockTile(2, 2, 16, 16, 8, num_warps=1, num_stages=2, spill_bytes=80),
)
UNEXPANDED = (  # expand ratio 1: X alone comes in, and the sums of c_out of at most 32 are few
    BlockTile(2, 4, 16, 16, 16, num_warps=1, num_stages=2, spill_bytes=64),
    BlockTile(2, 2, 16, 16, 16, num_warps=1, num_stages=2),
)
MIDDLE = (  # c_out of at most 64: whole rows of 14 at stride 1, of whose halo only two columns are expanded in vain
    BlockTile(1, 14, 16, 64, 32, num_warps=4, num_stages=2, spill_bytes=176),
    BlockTile(1, 7, 16, 64, 32, num_warps=4, spill_bytes=96),
    BlockTile(2, 2, 16, 64, 32, num_warps=4, spill_bytes=64),
)
BROAD = (  # at most 96: the sums of 14 pixels would not fit into registers
    BlockTile(1, 7, 16, 64, 32, num_warps=4, num_stages=2, spill_bytes=112),
    BlockTile(2, 2, 16, 64, 32, num_warps=4, spill_bytes=80),
    BlockTile(1, 2, 16, 64, 32, num_warps=4, spill_bytes=64),
)
BROADER = (  # at most 128: nor would those of 7
    BlockTile(1, 5, 16, 64, 32, num_warps=4, num_stages=2, spill_bytes=192),
    BlockTile(1, 2, 16, 64, 32, num_warps=4, spill_bytes=32),
)
SHRINKING = (  # stride 2 to at most 160: eight warps hold the sums of 7 pixels
    BlockTile(1, 7, 16, 128, 64, num_warps=8, num_stages=2, spill_bytes=256),
    BlockTile(1, 2, 16, 64, 32, num_warps=4, spill_bytes=32),
)
SPLIT = (  # the rest: B is stored, 0.19 MB an image in each of the last three blocks; no sums of c_out in registers
    BlockTile(7, 7, 16, 64, 16, num_warps=8, spill_bytes=128, split=True),  # images of 7 x 7 and less: nothing twice
    BlockTile(2, 7, 16, 64, 16, num_warps=4, spill_bytes=228, split=True),
)
LOOPED = BlockTile(1, 2, 16, 32, 16, num_warps=2, spill_bytes=64, split=True, looped=True)  # whatever doesn't fit else
PROJECT = ProjectTile(64, 64, 32, num_warps=4, num_stages=3)
HEAD = (  # the narrowest that holds all pixels: 7 x 7 and 6 x 6 fill three quarters and a half of 64
    HeadTile(16, 128, 32, num_warps=4, num_stages=3),
    HeadTile(32, 128, 32, num_warps=4, num_stages=3),
    HeadTile(64, 128, 32, num_warps=4, num_stages=3),
)
BLOCK_K = 32
MAX_UNROLLED = 256  # c_in; what is wider is read in a loop, as each product of it is code
WARPS_TO_FILL = 4  # a processor's schedulers


def block_k(c_in: int) -> int:
    """Channels of X in one product of matrices."""
    return 16 if c_in <= 16 else BLOCK_K


def _block_rows(c_in: int, c_out: int, stride: int, H_out: int, W_out: int, expands: bool) -> tuple[BlockTile, ...]:
    small = stride == 1 and max(H_out, W_out) <= 7
    if expands and c_in > MAX_UNROLLED:
        return ()
    if c_out <= 32:
        return NARROW if expands else UNEXPANDED
    if c_out <= 64 and expands:
        return MIDDLE if stride == 1 else MIDDLE[1:]
    if c_out <= 96 and expands:
        return BROAD
    if c_out <= 128 and expands and not small:
        return BROADER
    if c_out <= 160 and stride == 2 and c_in <= 96:
        return SHRINKING
    return SPLIT if small else SPLIT[1:]


@functools.lru_cache(maxsize=1024)  # like ``pick``, on the way of every launch; a server's shapes may never end
def block_tiles(
    c_in: int,
    c_out: int,
    stride: int,
    H_out: int,
    W_out: int,
    element_size: int,
    limits: Limits,
    *,
    expands: bool,
) -> tuple[BlockTile, ...]:
    """Tiles for a block with an output of ``H_out x W_out``, the cheapest on a full grid first; all fit the device."""
    rows = [row.fitted(H_out, W_out) for row in _block_rows(c_in, c_out, stride, H_out, W_out, expands)]
    if element_size == 4:  # fp32 takes twice the registers for the factors of a product
        rows = rows[-1:]
    fitting = tuple(row for row in rows if row.shared_bytes(c_in, c_out, stride, element_size) <= limits.shared)
    return fitting or (LOOPED.fitted(H_out, W_out),)


@functools.lru_cache(maxsize=1024)
def pick(rows: tuple[BlockTile, ...], N: int, c_mid: int, H_out: int, W_out: int, limits: Limits) -> BlockTile:
    """The first of ``rows`` whose programs for N images keep the device's schedulers busy, else the last."""
    for row in rows:
        programs = cdiv(N * cdiv(H_out, row.TILE_H) * cdiv(W_out, row.TILE_W), row.BLOCK_M)
        programs *= cdiv(c_mid, row.BLOCK_E) if row.split else 1
        if programs * row.num_warps >= WARPS_TO_FILL * limits.processors:
            return row
    return rows[-1]


class ExpandTile(NamedTuple):
    """BLOCK_S strips of COLUMNS columns by BLOCK_E channels a program, for pass P2.

    WIDE columns of X and WIDE_OUT of D are loaded, multiplied and stored at once; UNROLL rows are one step.
    """

    COLUMNS: int
    WIDE: int
    WIDE_OUT: int
    BLOCK_E: int
    UNROLL: int
    num_warps: int
    num_stages: int = 2
    spill_bytes: int = 0
    BLOCK_S: int = 8

    def fitted(self, H_out: int) -> ExpandTile:
        """The same for images of ``H_out`` rows, which two rows a step must divide."""
        return self if H_out % self.UNROLL == 0 else self._replace(UNROLL=1)


class ExpandGradTile(NamedTuple):
    """BLOCK_S strips of COLUMNS columns of D by BLOCK_E channels a program, for pass B2.

    WIDE columns of X are loaded, multiplied and stored at once; UNROLL rows are one step.
    """

    COLUMNS: int
    WIDE: int
    BLOCK_E: int
    UNROLL: int
    num_warps: int
    num_stages: int = 2
    spill_bytes: int = 0
    BLOCK_S: int = 8

    def fitted(self, H_out: int) -> ExpandGradTile:
        """The same for images of ``H_out`` rows, which two rows a step must divide."""
        return self if H_out % self.UNROLL == 0 else self._replace(UNROLL=1)


# A warp multiplies 16 channels of c_mid by 8 pixels, so a warp has 16 channels of the block, or on sm_90 four have 64
# by wgmma. More warps would share no work but the loads of X.
WALKING_WARPS = 5  # a processor: 8 could reside at 255 registers, but a shorter walk reads and leaves more


def walk_rows(rows: int, programs: int, tile: ExpandTile | ExpandGradTile, processors: int) -> int:
    """Rows of a walk, as ``depthwise_rows``, a multiple of what the tile does in a step."""
    filling = round(WALKING_WARPS * processors / (max(programs, 1) * tile.num_warps))
    chunks = max(1, min(filling, cdiv(rows, MIN_ROWS)))
    return cdiv(cdiv(rows, chunks), tile.UNROLL) * tile.UNROLL


def _widest(W_out: int, *columns: int) -> int:
    """Of ``columns`` those that idle least in the last strip, of these the most."""
    return min(columns, key=lambda n: (cdiv(W_out, n) * n, -n))


def expand_tile(c_mid: int, stride: int, W_out: int, element_size: int) -> ExpandTile:
    """Tile of pass P2. What little spills is invariants of the walk; fp32 takes twice the registers for its factors."""
    broad = (c_mid % 64 == 0 and c_mid > 64) or c_mid >= 256
    if stride == 1:
        COLUMNS = _widest(W_out, 8, 4)
        tile = ExpandTile(COLUMNS, COLUMNS if broad else 4, 4, 64 if broad else 16, 2, num_warps=4 if broad else 1)
    elif broad:
        COLUMNS = 8 if c_mid >= 256 and _widest(W_out, 8, 4) == 8 else 4
        tile = ExpandTile(COLUMNS, 8, 4, 64, 2 if COLUMNS == 4 else 1, num_warps=4)
    elif c_mid % 32 == 0:
        tile = ExpandTile(4, 4, 4, 32, 2, num_warps=2)
    else:
        tile = ExpandTile(4, 8, 4, 16, 2, num_warps=1, num_stages=1)
    return tile._replace(spill_bytes=(352 if broad else 128) * (element_size // 2))


THIN = 32  # c_in up to which pass B2 makes T and S itself; with more it stores dZ1


def expand_grad_tile(
    c_in: int, c_mid: int, c_out: int, stride: int, W_out: int, element_size: int, limits: Limits, *, expands: bool
) -> ExpandGradTile:
    """Tile of pass B2.

    With c_in of at most THIN two warps have 32 channels of c_mid, as four with 64 would add to T together; with more,
    four, whose products are wgmma on sm_90. All registers are in use, and what spills is read outside the walk but for
    images of at most 8 columns, whose strips are the image and need no halo.
    """
    if c_mid <= 16 or (c_mid % 32 in range(1, 17) and c_mid < 96):
        BLOCK_E, num_warps = 16, 1
    elif stride == 2 or c_in <= THIN or (limits.tensor_memory and c_in + c_out > 224):  # whose weights would fill it
        BLOCK_E, num_warps = 32, 2
    else:
        BLOCK_E, num_warps = 64, 4
    if stride == 2:
        COLUMNS = 2 if 128 < c_mid < 256 else 4
        tile = ExpandGradTile(COLUMNS, 4, BLOCK_E, 2 if COLUMNS == 2 else 1, num_warps, spill_bytes=256)
    elif W_out <= 8 and c_in > THIN and BLOCK_E == 64:
        tile = ExpandGradTile(8, 4, BLOCK_E, 1, num_warps, spill_bytes=704)
    elif c_in > THIN and expands:
        tile = ExpandGradTile(4, 4, BLOCK_E, 1, num_warps, spill_bytes=344 if BLOCK_E == 64 else 704)
    else:
        tile = ExpandGradTile(4, 2, BLOCK_E, 1 if expands else 2, num_warps, spill_bytes=256)
    if element_size == 4:  # twice the shared memory for factors
        block_e, warps, columns = min(BLOCK_E, 32), min(num_warps, 2), min(tile.COLUMNS, 4)
        tile = tile._replace(COLUMNS=columns, BLOCK_E=block_e, num_warps=warps, num_stages=1, spill_bytes=2816)
    return tile


class ThinTile(NamedTuple):
    """BLOCK_M pixels by BLOCK_C channels a program, for passes that multiply no matrices."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int = 4


class GradTile(NamedTuple):
    """For the products of matrices that end the block's backward pass: a program's tile, and the step of its loop."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    spill_bytes: int = 0


# Thin passes. 16 elements a thread: two loads of 16 bytes a tensor in half precision.
THIN_ELEMENTS = 4096
SUMS_PROGRAMS = 6  # a processor, for B0: what its registers let reside
SUMS_MIN_STEPS = 2  # with at least 64 pixels a program, partials are a thirty-second of what is read
# S = X^T dZ1 is [c_mid, c_in] in tiles of BLOCK_M x BLOCK_N, over pixels in steps of BLOCK_K. As many programs as
# processors: three stages keep the memory busy, and every further one leaves a partial. fp32 takes twice the shared
# memory and registers.
EXPAND_SUMS_HALF = GradTile(128, 64, 64, num_warps=4, num_stages=3)
EXPAND_SUMS_SINGLE = GradTile(64, 64, 32, num_warps=4, num_stages=3)
EXPAND_SUMS_MIN_STEPS = 4
# dX is [pixels, c_in] in tiles of BLOCK_M x BLOCK_N, over c_in and c_mid in steps of BLOCK_K.
INPUT_GRAD_NARROW = GradTile(128, 16, 16, num_warps=4, num_stages=2)  # bound by memory, as the next
INPUT_GRAD_MIDDLE = GradTile(128, 32, 32, num_warps=4, num_stages=2, spill_bytes=16)
INPUT_GRAD_BROAD = GradTile(128, 64, 32, num_warps=4, num_stages=3, spill_bytes=16)  # few blocks read dZ1 again
INPUT_GRAD_SINGLE = GradTile(64, 32, 16, num_warps=4, num_stages=2)  # fp32: IEEE products take registers
# In these c_in is whole: the gradient of W1 by BLOCK_M channels of c_mid, over BLOCK_K rows of the Gram matrix at
# a time, in fp64 (Triton's product of fp64 matrices doesn't compile where weights are in half precision); M by BLOCK_N
# columns, over c_mid.
WEIGHT_GRAD = GradTile(4, 0, 16, num_warps=8, num_stages=1, spill_bytes=16)
PULL_BACK = GradTile(0, 16, 64, num_warps=8, num_stages=1)


def weight_grad_tile(c_in: int) -> GradTile:
    """Tile for the gradient of W1: as many channels of c_mid as keep the registers of the widest c_in."""
    return WEIGHT_GRAD._replace(BLOCK_M=max(WEIGHT_GRAD.BLOCK_M, 1024 >> (c_in - 1).bit_length()))


def _padded_least(C: int, *blocks: int) -> int:
    """Of ``blocks`` the one that pads C channels least, of these the widest."""
    return min(blocks, key=lambda block: (cdiv(C, block) * block, -block))


def thin_tile(C: int) -> ThinTile:
    """Tile of the thin passes over C channels; 32 of them are two sectors in half precision, 16 one."""
    BLOCK_C = 1 << (C - 1).bit_length() if C <= 16 else _padded_least(C, 64, 32)
    return ThinTile(THIN_ELEMENTS // BLOCK_C, BLOCK_C)


def expand_sums_tile(c_in: int, element_size: int) -> GradTile:
    """Tile for S."""
    tile = EXPAND_SUMS_SINGLE if element_size == 4 else EXPAND_SUMS_HALF
    return tile._replace(BLOCK_N=16 if c_in <= 16 else _padded_least(c_in, 64, 32))


def input_grad_tile(c_in: int, element_size: int) -> GradTile:
    """Tile for dX."""
    if c_in <= 16:
        return INPUT_GRAD_NARROW
    if element_size == 4:
        return INPUT_GRAD_SINGLE
    return INPUT_GRAD_MIDDLE if c_in <= 32 else INPUT_GRAD_BROAD


class ProjectGradTile(NamedTuple):
    """BLOCK_M pixels by BLOCK_E channels of D a step, for pass B1."""

    BLOCK_M: int
    BLOCK_E: int
    num_warps: int
    num_stages: int = 2
    spill_bytes: int = 0


def project_tile(c_out: int) -> ProjectTile:
    """Tile of pass P3: as many pixels as leave registers beside their sums of all of c_out."""
    BLOCK_O = max(16, min(64, 1 << (c_out - 1).bit_length()))
    BLOCK_M = 128 if c_out <= 128 else 64 if c_out <= 192 else 32
    return ProjectTile(BLOCK_M, BLOCK_O, 32, num_warps=4, num_stages=3, spill_bytes=176)


def project_grad_tile(c_mid: int, c_out: int, element_size: int) -> ProjectGradTile:
    """Tile of pass B1."""
    if element_size == 4:  # twice the registers for factors, and twice the shared memory
        return ProjectGradTile(16, 16, num_warps=1, num_stages=1, spill_bytes=416)
    if c_out > 320:  # sums of dW2 [BLOCK_E, c_out] in registers
        return ProjectGradTile(32, 32, num_warps=4, spill_bytes=416)
    if (c_mid % 64 == 0 and c_mid > 64) or c_mid >= 256:
        return ProjectGradTile(64 if c_out <= 160 else 32, 64, num_warps=4, spill_bytes=416)
    return ProjectGradTile(64, 16, num_warps=1, spill_bytes=16)


def pixel_tiles(tiles: int, side: int, num_warps: int, processors: int, *, most: int | None = None) -> int:
    """How many of ``tiles`` of pixels a program goes through, where ``side`` programs share each.

    As many programs as give each processor its warps, but at most ``most`` (and then as many as give each scheduler
    one) where a program leaves many partial sums.
    """
    warps = max(side, 1) * num_warps
    programs = cdiv(WARPS_PER_PROCESSOR * processors, warps)
    if most is not None:
        programs = min(programs, max(most, cdiv(WARPS_TO_FILL * processors, warps)))
    tiles = max(tiles, 1)
    least = cdiv(tiles, min(programs, tiles))
    # A walk that ends with the pixels needs no masks, so a little longer is better than uneven.
    return next((n for n in range(least, min(2 * least, tiles) + 1) if tiles % n == 0), least)


def head_tile(pixels: int) -> HeadTile:
    """Tile for images of ``pixels`` pixels."""
    return next((tile for tile in HEAD if pixels <= tile.BLOCK_P), HEAD[-1])


def record_key(
    kernel: str, c_in: int, c_mid: int, c_out: int, stride: int, tile: BlockTile | HeadTile
) -> tuple[str | int, ...]:
    """What names a row of the record; two sides of an image differ by a few instructions and share their name."""
    sizes = (int(value) for name, value in tile._asdict().items() if name != "spill_bytes")
    return kernel, c_in, c_mid, c_out, stride, *sizes


@functools.cache
def record() -> dict[tuple[str | int, ...], dict[str, int]]:
    """Facts of compiled kernels by ``record_key``: registers, spills, instructions (sm_90, half precision).

    Their ``trips`` are those of the loop as it was compiled, fewer than the launch's where it was unrolled.
    """
    if not RECORD.exists():
        return {}
    rows = json.loads(RECORD.read_text())["rows"]
    return {tuple(row["key"]): row for row in sorted(rows, key=lambda row: row["side"])}  # the largest side counts


class MomentsTile(NamedTuple):
    """BLOCK_M pixels by BLOCK_C channels at a time, for sums over all pixels that are products of matrices.

    BLOCK_K are the channels of X in one product, where a product makes what is summed.
    """

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int = 2
    BLOCK_K: int = 0


# Statistics of X and of E. One warp for 16 x 16 of the Gram matrix, as two would do the same products twice; eight for
# 64 x 64, where a program may have two blocks of X with their sums: in four they spill. IEEE products have no tensor
# cores: each is code, so few pixels of fp32 at a time.
GRAM = (
    MomentsTile(64, 16, num_warps=1, num_stages=3),
    MomentsTile(64, 32, num_warps=2, num_stages=3),
    MomentsTile(64, 64, num_warps=8, num_stages=3),
)
GRAM_FP32 = (
    MomentsTile(16, 16, num_warps=1),
    MomentsTile(16, 32, num_warps=2),
    MomentsTile(16, 64, num_warps=4),
)
DIRECT = MomentsTile(64, 64, num_warps=4, num_stages=2, BLOCK_K=32)
DIRECT_FP32 = MomentsTile(64, 32, num_warps=4, num_stages=1, BLOCK_K=16)


def gram_tile(C: int, element_size: int) -> MomentsTile:
    """Tile for the Gram matrix of C channels: one block of all, or blocks of 64."""
    rows = GRAM_FP32 if element_size == 4 else GRAM
    return next((row for row in rows if C <= row.BLOCK_C), rows[-1])


def direct_tile(element_size: int) -> MomentsTile:
    """Tile for the moments of E."""
    return DIRECT_FP32 if element_size == 4 else DIRECT


def moments_rows(M: int, programs: int, tile: MomentsTile, least: int, processors: int) -> int:
    """Pixels a program of M, at ``least`` so many, where ``programs`` side by side cover the channels."""
    wanted = cdiv(WARPS_PER_PROCESSOR * processors, programs * tile.num_warps)
    return cdiv(max(cdiv(M, wanted), least), tile.BLOCK_M) * tile.BLOCK_M
