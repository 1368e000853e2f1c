"""Which launches the ahead-of-time report compiles: kernels on shapes of the network, and the choice of them.

A launch is what its launcher would make on tensors of the meta device, a block's with the tile for the capability's
representative device. Another kernel is added by a function from ``Case`` to ``Work`` in ``WORK`` and to the lists of
shapes behind it.
"""

# Torch and the kernels are imported where they are used: bench.aot refuses TRITON_INTERPRET before them.
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

BATCH = 256
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
WHOLE = (80, 90)  # capabilities for which --all compiles the shapes of every variant
ALPHAS, RESIZES = (1.0, 0.35), (224, 96)  # those of the other capabilities
ODD = (7, 14, 1)  # channels that no vector of four holds: the shape of no variant
FIRST, LAST, ALL = slice(1), slice(-1, None), slice(None)  # of a block's tiles: for full grids, for small ones, each


@dataclass(frozen=True, order=True)
class Case:
    """One row: a kernel on a block's depthwise convolution, a block or the head, and the capability that it is for.

    ``C`` are the channels of the depthwise convolution, or of the head's input. ``c_in`` and ``c_out`` are those of a
    block, ``c_out`` the head's, 0 otherwise. ``row`` is the place of a block's tile among those that it may take.
    """

    cap: int
    kernel: str
    C: int
    side: int
    stride: int
    dtype: str = "fp16"
    padding: str = "symmetric"
    c_in: int = 0
    c_out: int = 0
    row: int = 0

    @property
    def shape(self) -> str:
        """Channels, pixels of the input, stride."""
        channels = "-".join(str(size) for size in (self.c_in, self.C, self.c_out) if size)
        return f"{channels}x{self.side}x{self.side}/{self.stride}"

    @property
    def name(self) -> str:
        """As the table and ``--only`` know it."""
        padding = "" if self.padding == "symmetric" else f" {self.padding}"
        row = f" row {self.row}" if self.row else ""
        return f"{self.kernel} {self.shape} {self.dtype}{padding}{row} sm_{self.cap}"


class Work(NamedTuple):
    """What a case launches: elements of the operation's large tensor, iterations of each program's loop, bytes.

    ``tile`` is a block's or a head's. ``macs`` are a program's multiply-adds in products of matrices, where the
    compiler unrolls a loop over them as it likes.
    """

    launch: Any
    elements: int
    trips: int
    touched: int
    tile: Any = None
    macs: int = 0

    def compiled_trips(self, facts: Mapping[str, Any]) -> int:
        """Times that a program runs the loop as it was compiled: by ``macs``, where they are given."""
        if not self.macs:
            return self.trips
        if not facts["loop_macs"]:  # a loop that has been unrolled whole, or products that can't be read: at least once
            return 1
        return 1 + round((self.macs / facts["warps"] - facts["macs"]) / facts["loop_macs"])


def _like(case: Case) -> Any:
    import torch

    return torch.empty(0, dtype=getattr(torch, DTYPES[case.dtype]), device="meta")


def _tensors(case: Case) -> tuple[Any, Any, Any]:
    """Input, weight and output of the case's convolution."""
    from kernels import common

    like = _like(case)
    out = common.cdiv(case.side, case.stride)
    x = common.allocate((BATCH, case.C, case.side, case.side), like)
    return x, like.new_empty((case.C, 1, 3, 3)), common.allocate((BATCH, case.C, out, out), like)


def _depthwise_fwd(case: Case) -> Work:
    from kernels import depthwise_passes

    x, weight, y = _tensors(case)
    arguments = (x, weight, y, case.stride, case.padding)
    launch = depthwise_passes.depthwise_fwd_launch(*arguments)
    touched = depthwise_passes.depthwise_fwd_bytes(*arguments).touched
    return Work(launch, x.numel(), launch.arguments["ROWS"], touched)


def _depthwise_bwd(case: Case, *, dx: bool = True, dw: bool = True) -> Work:
    from kernels import depthwise_passes

    x, weight, dy = _tensors(case)
    arguments = (dy, x if dw else None, weight, x if dx else None, case.stride, case.padding)
    launch = depthwise_passes.depthwise_bwd_launch(*arguments)
    touched = depthwise_passes.depthwise_bwd_bytes(*arguments).touched
    return Work(launch, x.numel(), launch.arguments["ROWS"], touched)


def _sum_partials(case: Case) -> Work:
    """Sum of what ``_depthwise_bwd`` leaves."""
    from kernels import common, partials

    arguments = _depthwise_bwd(case).launch.arguments["partials_ptr"], _tensors(case)[1].view(case.C, 9)
    launch = partials.sum_partials_launch(*arguments)
    trips = common.cdiv(launch.arguments["P"], launch.arguments["BLOCK_P"])
    return Work(launch, arguments[0].numel(), trips, partials.sum_partials_bytes(*arguments).touched)


def _rows(case: Case) -> list[Any]:
    """Tiles that the case's block may take on the capability's device."""
    from bench import blocks, sass
    from kernels import block_inference_passes, common, roofline

    x, packed, _ = blocks.block_tensors(_block(case), 1, _like(case))
    limits = common.Limits(roofline.DEVICES[case.cap].processors, sass.CAPABILITIES[case.cap].shared_block)
    return block_inference_passes.block_rows(x, packed, case.stride, limits)


def _block(case: Case) -> Any:
    from bench.blocks import Block

    return Block(case.c_in, case.C, case.c_out, case.side, case.stride)


def _block_launch(case: Case, *, index: int = 0) -> Work:
    """The ``index``-th launch of the case's block; the first block of a network applies the stem's ReLU6."""
    from bench import blocks
    from kernels import block_inference_passes

    block, tile = _block(case), _rows(case)[case.row]
    tensors = blocks.block_tensors(block, BATCH, _like(case))
    how = (case.stride, block.residual, case.padding)
    launches = block_inference_passes.inverted_residual_launches(
        *tensors, *how, relu6_input=not block.expands, tile=tile
    )
    moved = block_inference_passes.inverted_residual_bytes(*tensors, *how, tile=tile)
    elements = tensors[2].numel() // case.c_out * case.C
    launch, touched = _on_gpu(launches[index]), moved[index].touched
    return Work(launch, elements, launch.trips, touched, tile, _macs(launch) if index else 0)


def _on_gpu(launch: Any) -> Any:
    """The launch with TF32 as torch has it by default on a GPU, where on meta tensors products are IEEE."""
    return launch._replace(arguments={**launch.arguments, "PRECISION": "tf32"})


def _macs(launch: Any) -> int:
    """Multiply-adds of a program that multiplies two tiles at each trip."""
    at = launch.arguments
    return at.get("BLOCK_M", at.get("BLOCK_P")) * at["BLOCK_O"] * at["BLOCK_K"] * launch.trips


def _head(case: Case) -> Work:
    from bench import blocks
    from kernels import head_inference, tiles

    tensors = blocks.head_tensors(case.C, case.c_out, case.side, BATCH, _like(case))
    launch = _on_gpu(head_inference.conv_relu6_mean_launch(*tensors))
    elements = BATCH * case.c_out * case.side**2
    touched = head_inference.conv_relu6_mean_bytes(*tensors).touched
    return Work(launch, elements, launch.trips, touched, tiles.head_tile(case.side**2), _macs(launch))


WORK: dict[str, Callable[[Case], Work]] = {
    "depthwise_fwd": _depthwise_fwd,
    "depthwise_bwd": _depthwise_bwd,
    "depthwise_dx": functools.partial(_depthwise_bwd, dw=False),
    "depthwise_dw": functools.partial(_depthwise_bwd, dx=False),
    "sum_partials": _sum_partials,
    "block": _block_launch,
    "block_project": functools.partial(_block_launch, index=1),
    "head": _head,
}
PASSES = ("depthwise_fwd", "depthwise_bwd", "sum_partials")  # what a step of training launches for a block
DEPTHWISE = ("depthwise_fwd", "depthwise_bwd", "depthwise_dx", "depthwise_dw", "sum_partials")
BLOCK_PASSES = PASSES[:2]
GRADIENTS = ("depthwise_dx", "depthwise_dw")


def _shapes(networks: Iterable[tuple[float, int]]) -> list[tuple[int, int, int]]:
    """Distinct (channels, side, stride) of the blocks of networks (alpha, resize), the largest pictures first."""
    from mnv2.model import layer_shapes

    blocks = [layer for network in networks for layer in layer_shapes(*network) if layer.kind == "block"]
    return sorted({(b.c_mid, b.height, b.stride) for b in blocks}, key=lambda shape: (-shape[1], shape))


# Shapes that take each row of ``kernels.tiles.DEPTHWISE``: an output 8 or 5 wide, channels that fill one BLOCK_C.
EACH_TILE = [(C, side * stride, stride) for C in (64, 96, 48) for side in (8, 5) for stride in (1, 2)]


def sample(caps: Iterable[int]) -> list[Case]:
    """What the default run compiles.

    Alpha 1.0 at 224 whole on sm_90. On each capability every kernel at both strides, and every tile with most registers
    in use: both gradients, in bf16, and channels that fill no vector. Types, "same" padding and single gradients on
    sm_90, which stands for all in these. Of the blocks at inference, see ``_sample_of_blocks``.
    """
    shapes = _shapes([(1.0, 224)])
    by_stride = [[shape for shape in shapes if shape[2] == stride] for stride in (1, 2)]
    largest = [group[0] for group in by_stride]
    cases = []
    for cap in caps:
        cases += [Case(cap, "depthwise_bwd", *shape, "bf16") for shape in (*EACH_TILE, ODD)]
        cases += _sample_of_blocks(cap)
        if cap != 90:
            cases += [Case(cap, kernel, *shape) for shape in largest for kernel in DEPTHWISE]
            continue
        cases += [Case(cap, kernel, *shape) for shape in shapes for kernel in PASSES]
        cases += [Case(cap, "depthwise_fwd", *shape) for shape in (*EACH_TILE, ODD)]
        middles = [group[len(group) // 2] for group in by_stride]
        cases += [Case(cap, k, *shape, dtype) for shape in middles for k in PASSES for dtype in ("bf16", "fp32")]
        cases += [Case(cap, kernel, *middles[1], padding="same") for kernel in BLOCK_PASSES]  # at stride 1 no other
        cases += [Case(cap, kernel, *shape) for shape in middles for kernel in GRADIENTS]
    return sorted(set(cases))


def _distinct(networks: Iterable[tuple[float, int]], kind: str) -> list[Any]:
    """Layers of a kind in networks (alpha, resize), those of a shape once."""
    from mnv2.model import layer_shapes

    layers = [layer for network in networks for layer in layer_shapes(*network) if layer.kind == kind]
    return list({(x.c_in, x.c_mid, x.c_out, x.stride, x.height): x for x in layers}.values())


def _launches(cap: int, layer: Any, rows: slice, dtype: str = "fp16", padding: str = "symmetric") -> list[Case]:
    """A case for each launch of a block with these of its tiles."""
    first = Case(cap, "block", layer.c_mid, layer.height, layer.stride, dtype, padding, layer.c_in, layer.c_out)
    cases = []
    for row, tile in list(enumerate(_rows(first)))[rows]:
        cases += [replace(first, row=row, kernel=kernel) for kernel in ("block", "block_project")[: 1 + tile.split]]
    return cases


def _heads(cap: int, networks: Iterable[tuple[float, int]]) -> list[Case]:
    return [Case(cap, "head", x.c_in, x.height, 1, c_out=x.c_out) for x in _distinct(networks, "head")]


def _sample_of_blocks(cap: int) -> list[Case]:
    """Blocks of alpha 1.0 at 224, as few as they take seconds each: all on sm_90, with the tile for a full grid.

    Three of them, of few channels, of many and split, stand for the others: in all their tiles and in bf16 there, and
    on the other capabilities; split in the shorter of two tiles, which doesn't take a minute. fp32 and "same" padding
    are compiled for one.
    """
    blocks = _distinct([(1.0, 224)], "block")
    narrow, broad, split = (next(b for b in blocks if b.residual and b.c_out == c_out) for c_out in (24, 96, 160))
    cases = _heads(cap, [(1.0, 224)])
    three = ((narrow, FIRST), (broad, FIRST), (split, LAST))
    if cap != 90:
        return cases + [case for block, rows in three for case in _launches(cap, block, rows)]
    for block in blocks:
        cases += _launches(cap, block, FIRST)
    for block, rows in three:
        cases += _launches(cap, block, ALL) + _launches(cap, block, rows, "bf16")
    shrinks = next(block for block in blocks if block.stride == 2)
    return cases + _launches(cap, narrow, LAST, "fp32") + _launches(cap, shrinks, FIRST, padding="same")


def _every_block(cap: int) -> list[Case]:
    """Blocks and heads at 224: of all widths and in all tiles on sm_90, with alpha 1.0 at the other sides too.

    Alpha 1.0 at 224 in fp32 (TF32) too.
    """
    from mnv2.model import VARIANTS

    whole = [(alpha, 224) for alpha in VARIANTS] if cap == 90 else [(1.0, 224)]
    smaller = [(1.0, resize) for resize in VARIANTS[1.0]] if cap == 90 else []
    cases = [case for b in _distinct(whole, "block") for case in _launches(cap, b, ALL if cap == 90 else FIRST)]
    cases += [case for b in _distinct(smaller, "block") for case in _launches(cap, b, FIRST)]
    cases += [case for b in _distinct([(1.0, 224)], "block") for case in _launches(cap, b, FIRST, "fp32")]
    return cases + _heads(cap, [*whole, *smaller])


def blocks_of_network(cap: int) -> list[Case]:
    """Launches of the 17 blocks of alpha 1.0 at 224 with the tiles for full grids, in order."""
    from mnv2.model import layer_shapes

    blocks = [layer for layer in layer_shapes(1.0, 224) if layer.kind == "block"]
    return [case for block in blocks for case in _launches(cap, block, FIRST)]


def every(caps: Iterable[int]) -> list[Case]:
    """The sample, blocks, and the depthwise shapes of all variants on ``WHOLE``, of four of them on the others."""
    from mnv2.model import VARIANTS

    caps = tuple(caps)
    variants = [(alpha, resize) for alpha, resizes in VARIANTS.items() for resize in resizes]
    corners = [(alpha, resize) for alpha in ALPHAS for resize in RESIZES]
    shapes = {cap: _shapes(variants if cap in WHOLE else corners) for cap in caps}
    cases = [Case(cap, kernel, *shape) for cap in caps for shape in shapes[cap] for kernel in PASSES]
    blocks = [case for cap in caps for case in _every_block(cap)]
    return sorted({*cases, *blocks, *sample(caps)})
