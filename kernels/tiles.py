"""Block sizes as data: which tile a kernel takes for a shape, and why.

A tile is chosen by channels and width, and how far a program walks by whether the grid fills the device. Neither is
tuned by batch, so a partial batch compiles nothing. Every row is compiled ahead of time for every supported GPU by
``python -m bench.aot``, which fails where a row spills more than it declares.
"""

from __future__ import annotations

from typing import NamedTuple

from .common import cdiv


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
