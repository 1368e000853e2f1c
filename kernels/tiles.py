"""Block sizes as data: which tile a kernel takes for a shape, and why.

A tile is chosen by channels and width, and a block's by what shared memory allows. Whether the grid fills the device
decides between a few rows of a block, and how far a program walks. Neither is tuned by batch. Rows are compiled ahead
of time by ``python -m bench.aot``, which fails where one spills more than it declares. A ``choice`` has other tiles
beside the rule's, of which ``python -m bench.tune`` may have measured a better one on a device.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import measured
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


@measured.choice("depthwise", lambda default, at: DEPTHWISE)
def depthwise_tile(
    C: int, stride: int, width: int, element_size: int, limits: Limits, *, backward: bool
) -> DepthwiseTile:
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


def with_each(tile: Any, *changes: dict[str, int]) -> Iterator[Any]:
    """``tile`` with one of ``changes`` at a time."""
    return (tile._replace(**change) for change in changes)


def _other_project_tiles(default: ProjectTile, at: Mapping[str, Any]) -> Iterator[ProjectTile]:
    return with_each(
        default,
        dict(BLOCK_M=128),
        dict(BLOCK_M=128, num_warps=8),
        dict(BLOCK_O=32),
        dict(BLOCK_O=128, num_warps=8),
        dict(BLOCK_K=64),
        dict(num_stages=4),
    )


@measured.choice("project", _other_project_tiles)
def project_tile(c_mid: int, c_out: int, element_size: int, limits: Limits) -> ProjectTile:
    """Tile for the projection of B where it is stored."""
    return PROJECT


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


def _fitting_rows(
    c_in: int, c_out: int, stride: int, H_out: int, W_out: int, element_size: int, limits: Limits, *, expands: bool
) -> tuple[BlockTile, ...]:
    rows = [row.fitted(H_out, W_out) for row in _block_rows(c_in, c_out, stride, H_out, W_out, expands)]
    if element_size == 4:  # fp32 takes twice the registers for the factors of a product
        rows = rows[-1:]
    fitting = tuple(row for row in rows if row.shared_bytes(c_in, c_out, stride, element_size) <= limits.shared)
    return fitting or (LOOPED.fitted(H_out, W_out),)


def _other_block_tiles(default: BlockTile, at: Mapping[str, Any]) -> Iterator[BlockTile]:
    """The other rows, each in another number of stages too, and where c_out isn't narrow those that store B."""
    if default.looped:
        return
    rows = _fitting_rows(**at)
    rows += tuple(row._replace(num_stages=3 - row.num_stages) for row in rows)
    if at["expands"] and at["c_out"] > 32:
        rows += tuple(row.fitted(at["H_out"], at["W_out"]) for row in SPLIT)
    sizes = at["c_in"], at["c_out"], at["stride"], at["element_size"]
    yield from (row for row in rows if row.shared_bytes(*sizes) <= at["limits"].shared)


@measured.choice("block", _other_block_tiles)
def block_tile(
    c_in: int,
    c_out: int,
    stride: int,
    H_out: int,
    W_out: int,
    element_size: int,
    limits: Limits,
    *,
    expands: bool,
) -> BlockTile:
    """Tile for a block with an output of ``H_out x W_out`` whose grid fills the device."""
    return _fitting_rows(c_in, c_out, stride, H_out, W_out, element_size, limits, expands=expands)[0]


@measured.remembered
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
    """Tiles for a block with an output of ``H_out x W_out``, the best on a full grid first; all fit the device.

    Behind one that was measured to be the best come those of fewer pixels, which fill a device with less.
    """
    rows = _fitting_rows(c_in, c_out, stride, H_out, W_out, element_size, limits, expands=expands)
    best = block_tile(c_in, c_out, stride, H_out, W_out, element_size, limits, expands=expands)
    if best == rows[0]:
        return rows
    return best, *(row for row in rows if row.TILE_H * row.TILE_W < best.TILE_H * best.TILE_W)


@functools.lru_cache(maxsize=1024)
def pick(rows: tuple[BlockTile, ...], N: int, c_mid: int, H_out: int, W_out: int, limits: Limits) -> BlockTile:
    """The first of ``rows`` whose programs for N images keep the device's schedulers busy, else the last."""
    for row in rows:
        programs = cdiv(N * cdiv(H_out, row.TILE_H) * cdiv(W_out, row.TILE_W), row.BLOCK_M)
        programs *= cdiv(c_mid, row.BLOCK_E) if row.split else 1
        if programs * row.num_warps >= WARPS_TO_FILL * limits.processors:
            return row
    return rows[-1]


def _other_head_tiles(default: HeadTile, at: Mapping[str, Any]) -> Iterator[HeadTile]:
    return with_each(
        default,
        dict(BLOCK_O=64),
        dict(BLOCK_O=256, num_warps=8),
        dict(num_warps=8),
        dict(BLOCK_K=64),
        dict(num_stages=2),
        dict(num_stages=4),
    )


@measured.choice("head", _other_head_tiles)
def head_tile(c_in: int, c_out: int, pixels: int, element_size: int, limits: Limits) -> HeadTile:
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
