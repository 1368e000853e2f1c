"""Which launches the ahead-of-time report compiles: kernels on shapes of the network, and the choice of them.

A launch is what its launcher would make on tensors of the meta device. Another kernel is added by a function from
``Case`` to ``Work`` in ``WORK`` and its name in ``PASSES``.
"""

# Torch and the kernels are imported where they are used: bench.aot refuses TRITON_INTERPRET before them.
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

BATCH = 256
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
WHOLE = (80, 90)  # capabilities for which --all compiles the shapes of every variant
ALPHAS, RESIZES = (1.0, 0.35), (224, 96)  # those of the other capabilities
ODD = (7, 14, 1)  # channels that no vector of four holds: the shape of no variant


@dataclass(frozen=True, order=True)
class Case:
    """One row: a kernel on the depthwise convolution of a block, and the capability that it is compiled for."""

    cap: int
    kernel: str
    C: int
    side: int
    stride: int
    dtype: str = "fp16"
    padding: str = "symmetric"

    @property
    def name(self) -> str:
        """As the table and ``--only`` know it."""
        padding = "" if self.padding == "symmetric" else f" {self.padding}"
        return f"{self.kernel} {self.C}x{self.side}x{self.side}/{self.stride} {self.dtype}{padding} sm_{self.cap}"


class Work(NamedTuple):
    """What a case launches: elements of the operation's large tensor, iterations of each program's loop, bytes."""

    launch: Any
    elements: int
    trips: int
    touched: int


def _tensors(case: Case) -> tuple[Any, Any, Any]:
    """Input, weight and output of the case's convolution."""
    import torch

    from kernels import common

    like = torch.empty(0, dtype=getattr(torch, DTYPES[case.dtype]), device="meta")
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


WORK: dict[str, Callable[[Case], Work]] = {
    "depthwise_fwd": _depthwise_fwd,
    "depthwise_bwd": _depthwise_bwd,
    "depthwise_dx": functools.partial(_depthwise_bwd, dw=False),
    "depthwise_dw": functools.partial(_depthwise_bwd, dx=False),
    "sum_partials": _sum_partials,
}
PASSES = ("depthwise_fwd", "depthwise_bwd", "sum_partials")  # what a step of training launches for a block
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
    sm_90, which stands for all in these.
    """
    shapes = _shapes([(1.0, 224)])
    by_stride = [[shape for shape in shapes if shape[2] == stride] for stride in (1, 2)]
    largest = [group[0] for group in by_stride]
    cases = []
    for cap in caps:
        cases += [Case(cap, "depthwise_bwd", *shape, "bf16") for shape in (*EACH_TILE, ODD)]
        if cap != 90:
            cases += [Case(cap, kernel, *shape) for shape in largest for kernel in WORK]
            continue
        cases += [Case(cap, kernel, *shape) for shape in shapes for kernel in PASSES]
        cases += [Case(cap, "depthwise_fwd", *shape) for shape in (*EACH_TILE, ODD)]
        middles = [group[len(group) // 2] for group in by_stride]
        cases += [Case(cap, k, *shape, dtype) for shape in middles for k in PASSES for dtype in ("bf16", "fp32")]
        cases += [Case(cap, kernel, *middles[1], padding="same") for kernel in BLOCK_PASSES]  # at stride 1 no other
        cases += [Case(cap, kernel, *shape) for shape in middles for kernel in GRADIENTS]
    return sorted(set(cases))


def every(caps: Iterable[int]) -> list[Case]:
    """The sample, and the shapes of all published variants on ``WHOLE``, of four of them on the other capabilities."""
    from mnv2.model import VARIANTS

    caps = tuple(caps)
    variants = [(alpha, resize) for alpha, resizes in VARIANTS.items() for resize in resizes]
    corners = [(alpha, resize) for alpha in ALPHAS for resize in RESIZES]
    shapes = {cap: _shapes(variants if cap in WHOLE else corners) for cap in caps}
    cases = [Case(cap, kernel, *shape) for cap in caps for shape in shapes[cap] for kernel in PASSES]
    return sorted({*cases, *sample(caps)})
