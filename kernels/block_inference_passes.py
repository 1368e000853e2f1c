"""Inverted residual at inference, the passes: launches of ``block_inference_kernels.py`` and their bytes."""

from __future__ import annotations

from torch import Tensor

from . import common, tiles
from .block_inference_kernels import geometry, inverted_residual_kernel, project_kernel
from .common import Launch, Traffic, cdiv, covered, front_padding
from .pack import PackedBlock
from .tiles import BlockTile


def block_rows(
    x: Tensor, packed: PackedBlock, stride: int, limits: common.Limits | None = None
) -> tuple[BlockTile, ...]:
    """Tiles that a launch on ``x [N, c_in, H, W]`` may take, whatever N is, on x's device or one of ``limits``."""
    H_out, W_out = (cdiv(size, stride) for size in x.shape[2:])
    return tiles.block_tiles(
        packed.c_in,
        packed.c_out,
        stride,
        H_out,
        W_out,
        x.element_size(),
        limits or common.limits(x.device),
        expands=packed.expand_weight is not None,
    )


def chosen_tile(x: Tensor, packed: PackedBlock, stride: int, limits: common.Limits | None = None) -> BlockTile:
    """The tile of a launch on ``x [N, c_in, H, W]``, on x's device or one of ``limits``."""
    limits = limits or common.limits(x.device)
    H_out, W_out = (cdiv(size, stride) for size in x.shape[2:])
    return tiles.pick(block_rows(x, packed, stride, limits), x.shape[0], packed.c_mid, H_out, W_out, limits)


def inverted_residual_launches(
    x: Tensor,
    packed: PackedBlock,
    y: Tensor,
    stride: int,
    residual: bool,
    padding: str,
    *,
    relu6_input: bool = False,
    tile: BlockTile | None = None,
) -> tuple[Launch, ...]:
    """Run the block on ``x [N, c_in, H, W]`` into ``y [N, c_out, H_out, W_out]``: one launch, or two with B between.

    A program of the first owns BLOCK_M micro-tiles of TILE_H x TILE_W output pixels and all channels, or of B
    BLOCK_E of them; a program of the second BLOCK_M pixels of Y and BLOCK_O channels. ``tile`` replaces the choice.
    """
    N, c_in, H, W = x.shape
    if tile is None:
        tile = chosen_tile(x, packed, stride)
    whole = not tile.split
    b = y if whole else common.allocate((N, packed.c_mid, *y.shape[2:]), x)
    micro_tiles = N * cdiv(y.shape[2], tile.TILE_H) * cdiv(y.shape[3], tile.TILE_W)
    arguments = dict(
        x_ptr=x,
        w1_ptr=packed.expand_weight,
        b1_ptr=packed.expand_bias,
        wd_ptr=packed.depthwise_weight,
        bd_ptr=packed.depthwise_bias,
        w2_ptr=packed.project_weight if whole else None,
        b2_ptr=packed.project_bias if whole else None,
        y_ptr=b,
        micro_tiles=micro_tiles,
        H=H,
        W=W,
        C_IN=c_in,
        C_MID=packed.c_mid,
        C_OUT=packed.c_out if whole else None,
        STRIDE=stride,
        PAD_H=front_padding(H, stride, padding),
        PAD_W=front_padding(W, stride, padding),
        RESIDUAL=residual and whole,
        RELU6_INPUT=relu6_input,
        PRECISION=common.dot_precision(x),
        TILE_H=tile.TILE_H,
        TILE_W=tile.TILE_W,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_E=tile.BLOCK_E,
        BLOCK_K=tiles.block_k(c_in),
        BLOCK_O=tile.BLOCK_O,
        LOOPED=packed.expand_weight is not None and tile.looped,
    )
    grid = (cdiv(micro_tiles, tile.BLOCK_M), 1 if whole else cdiv(packed.c_mid, tile.BLOCK_E))
    steps = cdiv(packed.c_mid, tile.BLOCK_E) if whole else 1
    first = Launch(inverted_residual_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)
    return (first,) if whole else (first, _project_launch(b, packed, x if residual else None, y, relu6_input))


def _project_launch(b: Tensor, packed: PackedBlock, residual: Tensor | None, y: Tensor, relu6_input: bool) -> Launch:
    pixels, limits = y.shape[0] * y.shape[2] * y.shape[3], common.limits(y.device)
    tile = tiles.project_tile(packed.c_mid, packed.c_out, y.element_size(), limits)
    arguments = dict(
        b_ptr=b,
        w2_ptr=packed.project_weight,
        b2_ptr=packed.project_bias,
        residual_ptr=residual,
        y_ptr=y,
        M=pixels,
        C_MID=packed.c_mid,
        C_OUT=packed.c_out,
        RELU6_INPUT=relu6_input,
        PRECISION=common.dot_precision(b),
        BLOCK_M=tile.BLOCK_M,
        BLOCK_O=tile.BLOCK_O,
        BLOCK_K=tile.BLOCK_K,
    )
    grid = (cdiv(pixels, tile.BLOCK_M), cdiv(packed.c_out, tile.BLOCK_O))
    steps = cdiv(packed.c_mid, tile.BLOCK_K)
    return Launch(project_kernel, grid, arguments, tile.num_warps, tile.num_stages, tile.spill_bytes, steps)


def every_launch(
    packed: PackedBlock,
    shape: tuple[int, ...],
    stride: int,
    residual: bool,
    padding: str,
    *,
    relu6_input: bool = False,
) -> list[Launch]:
    """One launch of each kernel that inputs of ``shape [N, c_in, H, W]`` and smaller batches may take."""
    N, _, H, W = shape
    x = common.allocate((1, packed.c_in, H, W), packed.project_weight)
    y = common.allocate((1, packed.c_out, cdiv(H, stride), cdiv(W, stride)), x)
    rows = block_rows(x, packed, stride)
    largest = tiles.pick(rows, N, packed.c_mid, y.shape[2], y.shape[3], common.limits(x.device))
    how = (stride, residual, padding)
    return [
        launch
        for tile in rows[rows.index(largest) :]
        for launch in inverted_residual_launches(x, packed, y, *how, relu6_input=relu6_input, tile=tile)
    ]


def inverted_residual_bytes(
    x: Tensor,
    packed: PackedBlock,
    y: Tensor,
    stride: int,
    residual: bool,
    padding: str,
    *,
    tile: BlockTile | None = None,
) -> tuple[Traffic, ...]:
    """Bytes of each of ``inverted_residual_launches``: X with the halo of each micro-tile, weights by each program."""
    launches = inverted_residual_launches(x, packed, y, stride, residual, padding, tile=tile)
    at, (groups, _) = launches[0].arguments, launches[0].grid
    (N, _, H, W), whole = x.shape, len(launches) == 1
    g = geometry(H, W, stride, at["PAD_H"], at["PAD_W"], at["TILE_H"], at["TILE_W"])
    tops = range(-g.top, g.tiles_h * at["TILE_H"] * stride - g.top, at["TILE_H"] * stride)
    lefts = range(-g.left, g.tiles_w * at["TILE_W"] * stride - g.left, at["TILE_W"] * stride)
    pixels = N * covered(tops, g.rows, H) * covered(lefts, g.columns, W)
    again = groups * at["BLOCK_M"] - at["micro_tiles"]  # times that the last micro-tile is computed in vain
    pixels += again * covered(tops[-1:], g.rows, H) * covered(lefts[-1:], g.columns, W)
    expands = packed.expand_weight is not None
    times = 1 if (whole and not at["LOOPED"]) or not expands else cdiv(packed.c_mid, at["BLOCK_E"])
    front = sum(tensor.nbytes for tensor in packed[:4] if tensor is not None)
    project = packed.project_weight.nbytes + packed.project_bias.nbytes
    added = y.nbytes if residual else 0  # of X, once more
    loaded = pixels * x.shape[1] * x.element_size() * times + groups * front
    if whole:
        loaded += groups * project + added
        return (Traffic(x.nbytes + front + project, y.nbytes, loaded, y.nbytes),)
    b, (groups, blocks_o) = at["y_ptr"].nbytes, launches[1].grid
    again = groups * launches[1].arguments["BLOCK_M"] * packed.c_mid * x.element_size() * blocks_o
    return (
        Traffic(x.nbytes + front, b, loaded, b),
        Traffic(b + project + added, y.nbytes, again + groups * project + added, y.nbytes),
    )
