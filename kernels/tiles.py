"""Block sizes as data: which tile a kernel takes for a shape, and why.

A row is chosen by channels, stride and width; never tuned by batch, so that a partial batch compiles nothing. Each row
is compiled ahead of time for every supported GPU by ``python -m bench.aot``, which fails where a row spills more than
it declares.
"""

from __future__ import annotations

from typing import NamedTuple

from .common import cdiv


class DepthwiseTile(NamedTuple):
    """BLOCK_M strips of COLUMNS columns by BLOCK_C channels a program.

    ``BLOCK_M * BLOCK_C = 128 * num_warps`` gives each thread four channels of one strip: loads of 8 bytes in half
    precision, and nine taps of weights in 36 registers.
    """

    BLOCK_M: int
    BLOCK_C: int
    COLUMNS: int
    num_warps: int
    spill_bytes: int = 0


def depthwise_tile(C: int, width: int, stride: int, *, backward: bool) -> DepthwiseTile:
    return DepthwiseTile(8, 32, 4, 2)


WARPS_PER_PROCESSOR = 32
MIN_ROWS = 8


def depthwise_rows(rows: int, programs: int, num_warps: int, processors: int) -> int:
    """Rows that a program walks down, where ``programs`` side by side cover the other dimensions.

    A walk reads two rows of halo, so it is as long as it can be while the grid gives each of ``processors`` its warps.
    """
    chunks = min(cdiv(WARPS_PER_PROCESSOR * processors, max(programs, 1) * num_warps), cdiv(rows, MIN_ROWS))
    return cdiv(rows, chunks)
