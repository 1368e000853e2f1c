"""Block sizes of the passes of the training block, as ``tiles.py`` has those of inference: by channels and width.

The other tiles of a ``choice`` differ from the rule's in one thing each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from . import measured
from .common import Limits, cdiv
from .tiles import MIN_ROWS, WARPS_PER_PROCESSOR, WARPS_TO_FILL, ProjectTile, with_each


class WalkTile(NamedTuple):
    """BLOCK_S strips of COLUMNS columns of D by BLOCK_E channels a program, for passes P2 and B2.

    WIDE columns of X are loaded and multiplied at once, and stored in B2; P2 stores WIDE_OUT of D. UNROLL rows are one
    step.
    """

    COLUMNS: int
    WIDE: int
    BLOCK_E: int
    UNROLL: int
    num_warps: int
    num_stages: int = 2
    spill_bytes: int = 0
    BLOCK_S: int = 8
    WIDE_OUT: int = 0

    def fitted(self, H_out: int) -> WalkTile:
        """The same for images of ``H_out`` rows, which two rows a step must divide."""
        return self if H_out % self.UNROLL == 0 else self._replace(UNROLL=1)


# A warp multiplies 16 channels of c_mid by 8 pixels, so a warp has 16 channels of the block, or on sm_90 four have 64
# by wgmma. More warps would share no work but the loads of X.
WALKING_WARPS = 5  # a processor: 8 could reside at 255 registers, but a shorter walk reads and leaves more


def walk_rows(rows: int, programs: int, tile: WalkTile, processors: int) -> int:
    """Rows of a walk, as ``depthwise_rows``, a multiple of what the tile does in a step."""
    filling = round(WALKING_WARPS * processors / (max(programs, 1) * tile.num_warps))
    chunks = max(1, min(filling, cdiv(rows, MIN_ROWS)))
    return cdiv(cdiv(rows, chunks), tile.UNROLL) * tile.UNROLL


def _widest(W_out: int, *columns: int) -> int:
    """Of ``columns`` those that idle least in the last strip, of these the most."""
    return min(columns, key=lambda n: (cdiv(W_out, n) * n, -n))


def _other_walk_tiles(default: WalkTile, at: Mapping[str, Any]) -> Iterator[WalkTile]:
    """Own columns of X must be whole times WIDE, those of D of WIDE_OUT; a warp has 16 channels."""
    columns = [dict(COLUMNS=n) for n in (4, 8) if n * at["stride"] % default.WIDE == 0]
    wide = [dict(WIDE=n) for n in (4, 8) if default.COLUMNS * at["stride"] % n == 0]
    warps = [dict(BLOCK_E=16 * n, num_warps=n) for n in (1, 2, 4)]
    steps = dict(UNROLL=3 - default.UNROLL), dict(num_stages=3 - default.num_stages)
    return with_each(default, *steps, *columns, *wide, *warps)


@measured.choice("P2", _other_walk_tiles)
def expand_tile(c_in: int, c_mid: int, stride: int, W_out: int, element_size: int, limits: Limits) -> WalkTile:
    """Tile of pass P2. What little spills is invariants of the walk; fp32 takes twice the registers for its factors."""
    broad = (c_mid % 64 == 0 and c_mid > 64) or c_mid >= 256
    if stride == 1:
        COLUMNS = _widest(W_out, 8, 4)
        tile = WalkTile(COLUMNS, COLUMNS if broad else 4, 64 if broad else 16, 2, num_warps=4 if broad else 1)
    elif broad:
        COLUMNS = 8 if c_mid >= 256 and _widest(W_out, 8, 4) == 8 else 4
        tile = WalkTile(COLUMNS, 8, 64, 2 if COLUMNS == 4 else 1, num_warps=4)
    elif c_mid % 32 == 0:
        tile = WalkTile(4, 4, 32, 2, num_warps=2)
    elif element_size == 4:
        tile = WalkTile(4, 4, 16, 1, num_warps=1, num_stages=1)
    elif c_mid > 192:  # c_in of more than 32: the factors of two rows a step would not fit
        tile = WalkTile(4, 8, 16, 1, num_warps=1)
    else:
        tile = WalkTile(4, 8, 16, 2, num_warps=1, num_stages=1)
    return tile._replace(WIDE_OUT=4, spill_bytes=(440 if broad else 128) * (element_size // 2))


THIN = 32  # c_in up to which pass B2 makes T and S itself; with more it stores dZ1


@measured.choice("B2", _other_walk_tiles)
def expand_grad_tile(
    c_in: int, c_mid: int, c_out: int, stride: int, W_out: int, element_size: int, limits: Limits, *, expands: bool
) -> WalkTile:
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
        tile = WalkTile(COLUMNS, 4, BLOCK_E, 2 if COLUMNS == 2 else 1, num_warps, spill_bytes=256)
    elif W_out <= 8 and c_in > THIN and BLOCK_E == 64:
        tile = WalkTile(8, 4, BLOCK_E, 1, num_warps, spill_bytes=752)
    elif c_in > THIN and expands:
        tile = WalkTile(4, 4, BLOCK_E, 1, num_warps, spill_bytes=344 if BLOCK_E == 64 else 704)
    else:
        tile = WalkTile(4, 2, BLOCK_E, 1 if expands else 2, num_warps, spill_bytes=296)
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
PULL_BACK = GradTile(0, 16, 64, num_warps=8, num_stages=1, spill_bytes=8)


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


def _other_grad_tiles(default: GradTile, at: Mapping[str, Any]) -> Iterator[GradTile]:
    return with_each(
        default,
        dict(BLOCK_M=64),
        dict(BLOCK_M=256, num_warps=8),
        dict(num_warps=8),
        dict(BLOCK_K=2 * default.BLOCK_K),
        dict(BLOCK_K=max(16, default.BLOCK_K // 2)),
        *(dict(num_stages=n) for n in (2, 3, 4)),
    )


@measured.choice("S", _other_grad_tiles)
def expand_sums_tile(c_in: int, c_mid: int, element_size: int, limits: Limits) -> GradTile:
    """Tile for S."""
    tile = EXPAND_SUMS_SINGLE if element_size == 4 else EXPAND_SUMS_HALF
    return tile._replace(BLOCK_N=16 if c_in <= 16 else _padded_least(c_in, 64, 32))


@measured.choice("B3", _other_grad_tiles)
def input_grad_tile(c_in: int, c_mid: int, element_size: int, limits: Limits) -> GradTile:
    """Tile for dX, of dZ1 with c_mid channels, or of T with a c_mid of 0."""
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


def _other_project_tiles(default: ProjectTile, at: Mapping[str, Any]) -> Iterator[ProjectTile]:
    return with_each(
        default,
        dict(BLOCK_M=default.BLOCK_M // 2),
        dict(BLOCK_M=2 * default.BLOCK_M, num_warps=8),
        dict(num_warps=8),
        dict(BLOCK_K=64),
        *(dict(num_stages=n) for n in (2, 4)),
    )


@measured.choice("P3", _other_project_tiles)
def project_tile(c_mid: int, c_out: int, element_size: int, limits: Limits) -> ProjectTile:
    """Tile of pass P3: as many pixels as leave registers beside their sums of all of c_out.

    Sums in tensor memory come to registers whole for the moments, and by other instructions take more of them.
    """
    BLOCK_O = max(16, min(64, 1 << (c_out - 1).bit_length()))
    BLOCK_M = 128 if c_out <= 128 else 64 if c_out <= 192 else 32
    if limits.tensor_memory and c_out > 64:
        BLOCK_M, BLOCK_O = (64, 32) if c_out <= 96 else (32, 64)
    spill_bytes = 424 if element_size == 4 else 176
    return ProjectTile(BLOCK_M, BLOCK_O, 32, num_warps=4, num_stages=3, spill_bytes=spill_bytes)


def _other_project_grad_tiles(default: ProjectGradTile, at: Mapping[str, Any]) -> Iterator[ProjectGradTile]:
    """A warp multiplies 16 channels, and its sums of dW2 over all of c_out stay in registers."""
    pixels = [dict(BLOCK_M=n) for n in (32, 64, 128)]
    warps = [dict(BLOCK_E=16 * n, num_warps=n) for n in (1, 2, 4)]
    return with_each(default, *pixels, *warps, *(dict(num_stages=n) for n in (1, 2, 3)))


@measured.choice("B1", _other_project_grad_tiles)
def project_grad_tile(c_mid: int, c_out: int, element_size: int, limits: Limits) -> ProjectGradTile:
    """Tile of pass B1."""
    if element_size == 4:  # twice the registers for factors, and twice the shared memory
        return ProjectGradTile(16, 16, num_warps=1, num_stages=1, spill_bytes=416)
    if c_out > 320:  # sums of dW2 [BLOCK_E, c_out] in registers
        return ProjectGradTile(32, 32, num_warps=4, spill_bytes=704)
    if (c_mid % 64 == 0 and c_mid > 64) or c_mid >= 256:
        return ProjectGradTile(64 if c_out <= 160 else 32, 64, num_warps=4, spill_bytes=416)
    return ProjectGradTile(64, 16, num_warps=1, spill_bytes=104)


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
