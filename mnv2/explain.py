"""Which path each layer of a network takes and why, what it moves, and what bounds it.

Bytes come from the formulas beside the launchers, instructions from the record beside the tiles
(``kernels/tiles.json``, compiled for sm_90 in half precision). Nothing is timed here; what ``python -m bench.tune`` has
timed on this device decides between paths and tiles, and is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kernels import PackedBlock, common, measured, tiles
from kernels.block_inference_passes import chosen_tile, inverted_residual_bytes, inverted_residual_launches
from kernels.common import Launch
from kernels.head_inference import conv_relu6_mean_bytes, conv_relu6_mean_launch
from kernels.roofline import Bounds, bounds, device_of

from .inference import FoldedBlock, FoldedHead, InferenceNetwork
from .model import InvertedResidual, LayerShape, MobileNetV2, layer_shapes

MB = 1e6


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its path and why, the kernels' tile, bytes an image, and the bound by bytes or whatever takes longer.

    ``torch_mb`` is what torch moves op by op, ``kernels_mb`` what the kernels do or would. ``not_finite`` counts values
    of the layer's output that are NaN or infinite, None where no pictures were given.
    """

    name: str
    shape: str
    path: str
    why: str = ""
    tile: str = ""
    torch_mb: float = 0.0
    kernels_mb: float | None = None
    bound_us: float | None = None
    binds: str = ""
    not_finite: int | None = None


@dataclass(frozen=True)
class Explanation:
    """A plan a layer; its text is a table."""

    plans: tuple[LayerPlan, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        """The table, under a line that says what its numbers are."""
        kind = str(self.dtype).removeprefix("torch.")
        checked = any(plan.not_finite is not None for plan in self.plans)
        header = ["layer", "shape", "path", "tile", "torch MB", "kernels MB", "bound us", "binds", "why"]
        rows = [header + ["not finite"] * checked]
        for plan in self.plans:
            cells = [plan.name, plan.shape, plan.path, plan.tile, f"{plan.torch_mb:.3f}"]
            cells.append("" if plan.kernels_mb is None else f"{plan.kernels_mb:.3f}")
            cells.append("" if plan.bound_us is None else f"{plan.bound_us:.3f}")
            rows.append([*cells, plan.binds, plan.why] + [str(plan.not_finite)] * checked)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        torch_mb = math.fsum(plan.torch_mb for plan in self.plans)
        kernels_mb = math.fsum(plan.torch_mb if plan.kernels_mb is None else plan.kernels_mb for plan in self.plans)
        here = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "a CPU"
        tuned = "measured on this device by `python -m bench.tune`"
        if not measured.on(self.device):
            tuned = "not measured on this device, defaults"
        lines = [
            f"{kind}, batch {self.batch}, on {here}. MB and bounds are an image's, with kernels on "
            f"{device_of(self.device).name}: counted, not measured. Tiles and paths: {tuned}.",
            *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
            f"all: {torch_mb:.2f} MB an image op by op, {kernels_mb:.2f} MB with the kernels",
        ]
        return "\n".join(lines)


def explain_unfolded(model: MobileNetV2, batch: int, resize: int, dtype: torch.dtype | None = None) -> Explanation:
    """Plans of all layers of a network with BatchNorm, in evaluation: torch's but for the blocks.

    ``dtype`` is autocast's, None for the type of the weights.

    Raises:
        ValueError: ``batch`` or ``resize`` is not positive.
    """
    _check_positive(batch=batch, resize=resize)
    weight = next(model.parameters())
    dtype = dtype or weight.dtype
    blocks = iter([module for module in model.features if isinstance(module, InvertedResidual)])
    plans = []
    for layer in model.layer_shapes(resize):
        torch_mb = _unfolded_bytes(layer, batch, dtype.itemsize) / batch / MB
        plan = LayerPlan(layer.name, _shape(layer), "torch", torch_mb=torch_mb)
        if layer.kind == "block":
            block = next(blocks)
            why = _why(partial(block.why_torch, layer, dtype))
            if why is None:
                with common.planned_for(weight.device):
                    planned = block.planned(batch, layer, dtype, training=False)
                touched = sum(traffic.touched for _, traffic in planned)
                plan = replace(plan, path="kernels, unfolded", kernels_mb=touched / batch / MB)
            advice = _advice("training block", layer, weight.device, dtype) if block.backend == "auto" else ""
            plan = replace(plan, why=_joined(why, advice and f"in training {advice}"))
        plans.append(plan)
    return Explanation(tuple(plans), batch, dtype, weight.device)


def _why(ask: Callable[[], str | None]) -> str | None:
    """What ``ask`` says of why torch runs a layer; kernels that are asked for and can't be are refused."""
    try:
        return ask()
    except ValueError as error:
        return f"refused: {error}"


def _advice(op: str, layer: LayerShape, device: torch.device, dtype: torch.dtype) -> str:
    sizes = {"c_in": layer.c_in, "c_out": layer.c_out, "H": layer.height, "W": layer.width}
    if layer.kind == "block":
        sizes |= {"c_mid": layer.c_mid, "stride": layer.stride}
    return measured.advice(op, device, dtype, **sizes)


def _joined(*reasons: str | None) -> str:
    return "; ".join(reason for reason in reasons if reason)


def explain(network: InferenceNetwork, batch: int, resize: int, *, check: Tensor | None = None) -> Explanation:
    """Plans of all layers for ``batch`` pictures of side ``resize``.

    Kernels are planned for the network's GPU, and for an H100 where it is on none. ``check`` is a batch of pictures
    ``[N, 3, H, W]`` to be run layer by layer, counting what is not finite: the kernels' clamp hides NaN.

    Raises:
        ValueError: ``batch`` or ``resize`` is not positive.
    """
    _check_positive(batch=batch, resize=resize)
    shapes = layer_shapes(network.alpha, resize, network.num_classes)
    modules = [module for _, module in network.layers()]
    found: Sequence[int | None] = [None] * len(modules)
    if check is not None:
        found = _not_finite(modules, network.prepared(check))
    with common.planned_for(network.device):
        plans = [
            _plan(shape, module, batch, network, not_finite)
            for shape, module, not_finite in zip(shapes, modules, found, strict=True)
        ]
    return Explanation(tuple(plans), batch, network.dtype, network.device)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _shape(layer: LayerShape) -> str:
    size = f"{layer.c_in}x{layer.height}x{layer.width}"
    return f"{size} -> {layer.c_out}x{layer.height_out}x{layer.width_out}"


@torch.no_grad()
def _not_finite(modules: Iterable[nn.Module], x: Tensor) -> list[int]:
    """Values of each layer's output that are NaN or infinite."""
    counts = []
    with common.without_autocast(x.device):
        for module in modules:
            x = module(x)
            counts.append(int((~x.isfinite()).sum()))
    return counts


def _plan(
    layer: LayerShape, module: nn.Module, batch: int, network: InferenceNetwork, not_finite: int | None
) -> LayerPlan:
    shape = _shape(layer)
    torch_mb = _torch_bytes(layer, batch, network.dtype.itemsize) / batch / MB
    if not isinstance(module, FoldedBlock | FoldedHead):
        return LayerPlan(layer.name, shape, "torch", torch_mb=torch_mb, not_finite=not_finite)
    why = _why(partial(module.why_torch, (batch, layer.c_in, layer.height, layer.width)))
    op = "inference block" if isinstance(module, FoldedBlock) else "head"
    advice = _advice(op, layer, network.device, network.dtype) if module.backend == "auto" else ""
    if isinstance(module, FoldedBlock):
        tile, touched, limits = _block_plan(module.packed, layer, batch, network)
    else:
        tile, touched, limits = _head_plan(module, layer, batch)
    longest = math.fsum(max(limit) for limit in limits)
    return LayerPlan(
        name=layer.name,
        shape=shape,
        path="kernels" if why is None else "torch",
        why=_joined(why, advice),
        tile=tile,
        torch_mb=torch_mb,
        kernels_mb=touched / batch / MB,
        bound_us=longest / batch * 1e6,
        binds=max(limits, key=max).binds if all(limit.issue for limit in limits) else "bytes alone",
        not_finite=not_finite,
    )


def _block_plan(
    packed: PackedBlock, layer: LayerShape, batch: int, network: InferenceNetwork
) -> tuple[str, int, list[Bounds]]:
    """Tile, bytes, and the bounds of each launch, on meta tensors: nothing is allocated."""
    packed, device, half = packed.to("meta"), network.device, network.dtype.itemsize == 2
    x = common.allocate((batch, layer.c_in, layer.height, layer.width), packed.project_weight)
    y = common.allocate((batch, layer.c_out, layer.height_out, layer.width_out), x)
    tile = chosen_tile(x, packed, layer.stride, common.limits(device))
    how = (layer.stride, layer.residual, network.padding)
    launches = inverted_residual_launches(x, packed, y, *how, tile=tile)
    traffic = inverted_residual_bytes(x, packed, y, *how, tile=tile)
    limits = []
    for kernel, launch, moved in zip(("block", "block_project"), launches, traffic, strict=False):
        limits.append(_bounds(kernel, layer, tile, launch, moved.touched, device, half))
    text = f"{tile.TILE_H}x{tile.TILE_W} pixels, {tile.BLOCK_E} channels, {tile.num_warps} warps"
    return text + ", B stored" * tile.split, sum(moved.touched for moved in traffic), limits


def _head_plan(module: FoldedHead, layer: LayerShape, batch: int) -> tuple[str, int, list[Bounds]]:
    weight, bias = module.weight.to("meta"), module.bias.to("meta")
    x = common.allocate((batch, layer.c_in, layer.height, layer.width), weight)
    features = common.allocate((batch, layer.c_out), x)
    moved = conv_relu6_mean_bytes(x, weight, bias, features)
    launch = conv_relu6_mean_launch(x, weight, bias, features)
    tile = tiles.head_tile(
        layer.c_in, layer.c_out, layer.height * layer.width, x.element_size(), common.limits(x.device)
    )
    limits = _bounds("head", layer, tile, launch, moved.touched, module.weight.device, weight.element_size() == 2)
    return f"{tile.BLOCK_P} pixels, {tile.BLOCK_O} channels, {tile.num_warps} warps", moved.touched, [limits]


def _bounds(
    kernel: str,
    layer: LayerShape,
    tile: tiles.BlockTile | tiles.HeadTile,
    launch: Launch,
    touched: int,
    device: torch.device,
    half: bool,
) -> Bounds:
    """Bounds of a launch, of its bytes alone where its kernel isn't on record, as none in fp32 is."""
    c_mid = layer.height * layer.width if kernel == "head" else layer.c_mid
    key = tiles.record_key(kernel, layer.c_in, c_mid, layer.c_out, layer.stride, tile)
    facts = tiles.record().get(key) if half else None
    trips = launch.trips if facts is None else facts["trips"]
    return bounds(device_of(device), facts, math.prod(launch.grid), trips, touched)


def _torch_bytes(layer: LayerShape, batch: int, element_size: int) -> int:
    """What torch moves for a folded layer: each operation reads its inputs and writes its output."""
    x = batch * layer.c_in * layer.height * layer.width
    y = batch * layer.c_out * layer.height_out * layer.width_out
    if layer.kind == "stem":
        return (x + y + 27 * layer.c_out) * element_size
    if layer.kind == "head":  # convolution, ReLU6, mean
        return (x + 4 * y + batch * layer.c_out + layer.c_in * layer.c_out) * element_size
    if layer.kind == "classifier":
        return (x + y + layer.c_in * layer.c_out) * element_size
    e, d = (batch * layer.c_mid * a * b for a, b in ((layer.height, layer.width), (layer.height_out, layer.width_out)))
    expand = x + 3 * e if layer.expand_macs else 2 * x  # convolution and ReLU6, or the stem's ReLU6
    weights = layer.c_mid * (9 + layer.c_out + (layer.c_in if layer.expand_macs else 0))
    return (expand + e + 4 * d + y + (3 * y if layer.residual else 0) + weights) * element_size


def _unfolded_bytes(layer: LayerShape, batch: int, element_size: int) -> int:
    """What torch moves for a layer with BatchNorm in evaluation, which reads and writes each output once more."""
    outputs = layer.c_out * layer.height_out * layer.width_out if layer.kind != "classifier" else 0
    if layer.kind == "block":
        outputs += layer.c_mid * layer.height_out * layer.width_out
        outputs += layer.c_mid * layer.height * layer.width if layer.expand_macs else 0
    relu6 = 2 * layer.c_in * layer.height * layer.width if layer.kind == "block" and not layer.expand_macs else 0
    stem = 2 * layer.c_out * layer.height_out * layer.width_out if layer.kind == "stem" else 0
    return _torch_bytes(layer, batch, element_size) + batch * element_size * (2 * outputs + stem - relu6)
