"""Which launches the ahead-of-time report compiles: kernels on shapes of the network, and the choice of them.

A launch is what its launcher would make on tensors of the meta device, a block's with the tile for the capability's
representative device. Another kernel is added by a function from ``Case`` to ``Work`` in ``WORK`` and to the lists of
shapes behind it.
"""

# Torch and the kernels are imported where they are used: bench.aot refuses TRITON_INTERPRET before them.
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

BATCH = 256
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
TENSOR_MEMORY = 100  # the capability whose products go through a memory of their own
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
    compiler unrolls a loop over them as it likes. ``walks`` are the trips of a loop around the one of ``trips``, 0
    where there is none.
    """

    launch: Any
    elements: int
    trips: int
    touched: int
    tile: Any = None
    macs: int = 0
    walks: int = 0

    def compiled_trips(self, facts: Mapping[str, Any]) -> int:
        """Times that a program runs the loop as it was compiled: by ``macs``, where they are given."""
        if not self.macs:
            return self.trips
        if not facts["loop_macs"]:  # a loop that has been unrolled whole, or products that can't be read: at least once
            return 1
        return 1 + round((self.macs / facts["warps"] - facts["macs"]) / facts["loop_macs"])

    def run_through(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """``facts`` with what a warp does in all trips of its loops, and no loop; nothing where there are no trips."""
        inner, outer = ("inner", "outer") if self.walks else ("loop", "none")
        around = facts.get(outer, 0) > 0
        trips = self._trips_of_nest(facts, around) if self.walks else self.compiled_trips(facts)
        found = dict(facts)
        for name, suffix in (("instructions", ""), ("macs", "_macs"), ("wavefronts", "_wavefronts")):
            once, body = facts[name], facts.get(inner + suffix, 0)
            if around:
                walk = facts[outer + suffix] + body * (trips - 1)
                total = once - facts[outer + suffix] + self.walks * walk
            else:
                total = once + body * (trips - 1)
            found[name] = total if self.trips else 0
            found["loop" + suffix] = 0
        return found

    def _trips_of_nest(self, facts: Mapping[str, Any], around: bool) -> int:
        """Trips of the inner loop in one of the loop around it; in all, where the compiler has left but one loop."""
        if not self.macs:
            return self.trips if around else self.trips * self.walks
        if not facts.get("inner_macs"):  # not readable; with one loop, that around a loop that is unrolled whole
            return self.trips if around else self.walks
        macs = self.macs // facts["warps"]
        rest = facts["outer_macs"] * self.walks if around else facts["macs"]
        return 1 + round((macs - rest) / (facts["inner_macs"] * (self.walks if around else 1)))


def sizes_of(launch: Any) -> Mapping[str, Any]:
    """Arguments of the launch by name, with those of its walk down the image where it has one."""
    at = launch.arguments
    return {**at, **vars(at["walk"])} if "walk" in at else at


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
    from kernels import common, head_inference, tiles

    tensors = blocks.head_tensors(case.C, case.c_out, case.side, BATCH, _like(case))
    launch = _on_gpu(head_inference.conv_relu6_mean_launch(*tensors))
    elements = BATCH * case.c_out * case.side**2
    touched = head_inference.conv_relu6_mean_bytes(*tensors).touched
    tile = tiles.head_tile(
        case.C, case.c_out, case.side**2, tensors[0].element_size(), common.limits(tensors[0].device)
    )
    return Work(launch, elements, launch.trips, touched, tile, _macs(launch))


@functools.lru_cache(maxsize=1024)
def _training_calls(case: Case) -> dict[str, Any]:
    """Passes of the case's block in training by name, on an H100's grid."""
    import torch

    from bench.training import passes_of
    from kernels import common

    limits = common.limits(torch.device("cpu"))._replace(tensor_memory=case.cap == TENSOR_MEMORY)
    with common.planned_for(limits):
        forward, backward = passes_of(_block(case), BATCH, _like(case), case.padding)
    return {call.name: call for call in (*forward, *backward)}


def _training(case: Case) -> Work:
    """A pass of the case's block; the elements are those of its largest tensor, of B2 those of E."""
    from torch import Tensor

    launch, touched = _pass(case)
    at = launch.arguments
    numbers = max(value.numel() for value in at.values() if isinstance(value, Tensor))
    elements = BATCH * case.side**2 * case.C if case.kernel == "B2" else numbers
    trips, macs, walks = launch.trips, 0, 0
    if case.kernel == "B2":
        walks = at["BLOCKS"]
        trips //= walks
    elif case.kernel == "P3":
        walks = at["TILES"]
        pieces = -(-at["C_OUT"] // at["BLOCK_O"])
        macs = at["BLOCK_M"] * at["BLOCK_O"] * pieces * at["BLOCK_K"] * trips * walks
    elif case.kernel == "P1":
        trips = at["ROWS"] // at["BLOCK_M"]
    elif case.kernel in ("P1 direct", "BN1 flagged"):
        trips = 0  # nothing is flagged, so programs return at once
    elif "BLOCK_P" in at:
        trips = -(-at["P"] // at["BLOCK_P"])
    elif case.kernel == "BN1":
        trips = -(-at["c_in"] // at["UNROLL"])
    elif case.kernel == "B3" and at["matrix_ptr"] is not None:
        # Two loops of the same products, over c_in and over c_mid, of which c_mid's is longer: counted by products.
        steps = -(-at["C_IN"] // at["BLOCK_K"]) + -(-at["C_MID"] // at["BLOCK_K"])
        macs = at["BLOCK_M"] * at["BLOCK_N"] * at["BLOCK_K"] * steps
    return Work(launch, elements, trips, touched, macs=macs, walks=walks)


def _pass(case: Case) -> tuple[Any, int]:
    """Launch and bytes of a pass."""
    call = _training_calls(_shared(case))[case.kernel]
    return call.launch, call.formula.touched


def _shared(case: Case) -> Case:
    """What a case's passes depend on: no kernel, and of capabilities whether they have tensor memory."""
    return replace(case, cap=TENSOR_MEMORY if case.cap == TENSOR_MEMORY else 0, kernel="")


def training_passes(layer: Any, cap: int, dtype: str = "fp16", padding: str = "symmetric") -> list[Case]:
    """A case for each pass of a block in training, in order."""
    case = Case(cap, "", layer.c_mid, layer.height, layer.stride, dtype, padding, layer.c_in, layer.c_out)
    return [replace(case, kernel=name) for name in _training_calls(_shared(case))]


TRAINING = (
    *("P1", "P1 merge", "BN1", "P1 direct", "BN1 flagged", "P2", "BN2", "P3", "BN3", "P4"),
    *("B0 sums", "BN3 grads", "B0 dP", "B1", "BN2 grads", "dW2", "W1 scaled", "W2 scaled", "B2", "dWd"),
    *("S", "S sum", "dbeta1", "dW1", "M, v", "B3"),
)
WALKS = ("P2", "B2")
HEAVY = (*WALKS, "P3", "B1")  # passes over tensors of c_mid channels that multiply
WORK: dict[str, Callable[[Case], Work]] = {
    "depthwise_fwd": _depthwise_fwd,
    "depthwise_bwd": _depthwise_bwd,
    "depthwise_dx": functools.partial(_depthwise_bwd, dw=False),
    "depthwise_dw": functools.partial(_depthwise_bwd, dx=False),
    "sum_partials": _sum_partials,
    "block": _block_launch,
    "block_project": functools.partial(_block_launch, index=1),
    "head": _head,
    **dict.fromkeys(TRAINING, _training),
}


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of a row of ``bench.aot``'s record, which has the side as height and width."""
    at = {**row, "side": row["height"]}
    return Case(**{field.name: at[field.name] for field in fields(Case)})


def work_of(case: Case) -> Work:
    """What the case launches; a kernel that isn't in ``WORK`` is a pass of training that isn't known here yet."""
    return WORK.get(case.kernel, _training)(case)


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
    sm_90, which stands for all in these. Of the blocks see ``_sample_of_blocks`` and ``_sample_of_training``.
    """
    shapes = _shapes([(1.0, 224)])
    by_stride = [[shape for shape in shapes if shape[2] == stride] for stride in (1, 2)]
    largest = [group[0] for group in by_stride]
    cases = []
    for cap in caps:
        cases += [Case(cap, "depthwise_bwd", *shape, "bf16") for shape in (*EACH_TILE, ODD)]
        cases += _sample_of_blocks(cap) + _sample_of_training(cap)
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


def _sample_of_training(cap: int) -> list[Case]:
    """Passes of blocks of alpha 1.0 at 224 in training, as few as they take seconds each.

    On sm_90 the heavy ones of a block without an expansion, of one at stride 2, and of a narrow, a broad and the
    broadest residual one, and of the narrow and broad ones all: as T is made of the one, and dZ1 stored of the other.
    The narrow one is compiled in other types too, and that at stride 2 in "same" padding. The other capabilities have
    the walks of the narrow or the broad one, sm_100 that of the broadest too, which takes most of its tensor memory.
    """
    blocks = _distinct([(1.0, 224)], "block")
    narrow, broad, broadest = (next(b for b in blocks if b.residual and b.c_out == c_out) for c_out in (24, 64, 160))
    unexpanded, shrinks = blocks[0], next(b for b in blocks if b.stride == 2)

    def some(layer: Any, kernels: Iterable[str], dtype: str = "fp16", padding: str = "symmetric") -> list[Case]:
        return [case for case in training_passes(layer, cap, dtype, padding) if case.kernel in kernels]

    if cap != 90:
        walks = some(broad if cap in (86, 120) else narrow, WALKS)
        return walks + some(broadest, ("B2",)) if cap == 100 else walks
    cases = [*some(narrow, TRAINING), *some(broad, (*HEAVY, "S", "M, v", "B3"))]
    cases += [case for layer in (unexpanded, shrinks, broadest) for case in some(layer, HEAVY)]
    return cases + some(narrow, WALKS, "bf16") + some(narrow, WALKS, "fp32") + some(shrinks, WALKS, padding="same")


def _every_training(cap: int) -> list[Case]:
    """All passes of blocks in training at 224: of all widths on sm_90, where alpha 1.0 is in fp32 (TF32) too."""
    from mnv2.model import VARIANTS

    whole = [(alpha, 224) for alpha in VARIANTS] if cap == 90 else [(1.0, 224)]
    cases = [case for layer in _distinct(whole, "block") for case in training_passes(layer, cap)]
    if cap == 90:
        cases += [case for b in _distinct([(1.0, 224)], "block") for case in training_passes(b, cap, "fp32")]
    return cases


def blocks_of_network(cap: int) -> list[Case]:
    """Launches of the 17 blocks of alpha 1.0 at 224 with the tiles for full grids, in order."""
    from mnv2.model import layer_shapes

    blocks = [layer for layer in layer_shapes(1.0, 224) if layer.kind == "block"]
    return [case for block in blocks for case in _launches(cap, block, FIRST)]


def training_of_network(cap: int) -> list[Case]:
    """Passes of the 17 blocks of alpha 1.0 at 224 in training, in order of the blocks."""
    from mnv2.model import layer_shapes

    blocks = [layer for layer in layer_shapes(1.0, 224) if layer.kind == "block"]
    return [case for block in blocks for case in training_passes(block, cap)]


def every(caps: Iterable[int]) -> list[Case]:
    """The sample, blocks, and the depthwise shapes of all variants on ``WHOLE``, of four of them on the others."""
    from mnv2.model import VARIANTS

    caps = tuple(caps)
    variants = [(alpha, resize) for alpha, resizes in VARIANTS.items() for resize in resizes]
    corners = [(alpha, resize) for alpha in ALPHAS for resize in RESIZES]
    shapes = {cap: _shapes(variants if cap in WHOLE else corners) for cap in caps}
    cases = [Case(cap, kernel, *shape) for cap in caps for shape in shapes[cap] for kernel in PASSES]
    blocks = [case for cap in caps for case in (*_every_block(cap), *_every_training(cap))]
    return sorted({*cases, *blocks, *sample(caps)})
