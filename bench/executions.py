"""What executions of MobileNetV2 move through device memory: kernel by kernel, ours and others.

An execution is a list of rows, one for each kernel in the order in which they run. A kernel is charged for each tensor
that it reads or writes once (caches are perfect inside a kernel, and keep nothing from one to the next), at a batch, by
which all is divided: so are weights. Executions:

ours         Inference: the folded network. The stem is torch's convolution, whose ReLU6 the first block applies as it
             reads; each block is the launches of `kernels.block_inference`, one or two with B between them, and the
             head with its mean one of `kernels.head_inference`. Training: each block is the passes of
             `kernels.inverted_residual_passes`, finalisers included, with D and P saved; stem and head are eager.
             Bytes are those of the formulas beside the launchers; tiles and the partials' number are those for an H100.
depthwise    (training) eager, but the depthwise convolution is `kernels.depthwise`: its forward, and both gradients in
             one pass with the sum of its partials.
eager        a kernel for each op under AMP in channels_last. In training BatchNorm reads its tensors twice, for the
             statistics and to normalise (x, and in the backward x and dy), and the in-place ReLU6 first clones its
             input, which its gradient needs. Convolutions have one kernel for each gradient.
eager_least  (training) eager where BatchNorm reads once, as if its tensors fitted in the cache, and ReLU6 clones
             nothing.
compiled     convolutions as in eager; what stands between two of them is one pointwise kernel, and in training one that
             reduces and one that applies, in both directions. ReLU6's gradient comes from BatchNorm's input.
epilogue     only convolutions move bytes. Inference: each reads its input and writes its output once, the residual is
             read in an epilogue. Training: raw convolution outputs are stored. BatchNorm and ReLU6 are applied as the
             next convolution loads, the sums of both directions are made in epilogues: an input gradient reads the raw
             input for that, and dY of a residual that it adds. Both gradients read dY with the raw output, from which
             BatchNorm's gradient comes. A residual's output is the one thing that a pass of its own writes.
compulsory   the bound for a kernel (in training, one for each direction) a block, stem and head: inference reads X and
             writes Y. Training adds a backward that reads X (all that must be saved) and dY and writes dX and the
             weights' gradients. Statistics of the batch need more passes than that: nothing attains it in training.

In all of them the image is read in half precision, the classifier's product is a kernel of its own, and so is pooling,
but in ours at inference: its network may move less than a compulsory one. Weights are in half precision; our kernels'
biases and depthwise weights are in fp32. Left out, as the same in all or negligible: AMP's casts of weights, a
BatchNorm's few numbers a channel, dropout, the loss, the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import depthwise_passes, head_inference, partials
from kernels.block_inference_passes import chosen_tile, inverted_residual_bytes, inverted_residual_launches
from mnv2.model import LayerShape

from .blocks import Block, block_tensors, head_tensors
from .count import Call
from .training import passes_of

MB = 1e6
HALF = torch.float16.itemsize
META = torch.device("meta")


@dataclass(frozen=True)
class Row:
    """One kernel at one batch: bytes of device memory, and for ours the bytes that its programs request."""

    block: str
    kind: str
    op: str
    by: str
    shape: str
    read: int
    written: int
    requested: int | None = None


class Passes(NamedTuple):
    """Rows of a layer, or of a part of it, in the order in which they run."""

    forward: list[Row]
    backward: list[Row]


@dataclass(frozen=True)
class Unit:
    """A convolution and its BatchNorm; ``x, z, w`` are bytes of its input, raw output and weights at a batch."""

    layer: LayerShape
    op: str
    batch: int
    c_in: int
    c_out: int
    weights: int
    side: int
    side_out: int
    stride: int = 1
    relu6: bool = True
    forks: bool = False  # its input is the residual's too
    joins: bool = False  # the residual is added to its output

    @property
    def x(self) -> int:
        return self.batch * self.c_in * self.side**2 * HALF

    @property
    def z(self) -> int:
        return self.batch * self.c_out * self.side_out**2 * HALF

    @property
    def w(self) -> int:
        return self.weights * HALF

    @property
    def shape(self) -> str:
        return f"{self.c_in}x{self.side}x{self.side} -> {self.c_out}x{self.side_out}x{self.side_out}"

    def row(self, op: str, read: int, written: int) -> Row:
        return Row(self.layer.name, self.layer.kind, f"{self.op} {op}", "torch", self.shape, read, written)


def units(layer: LayerShape, batch: int) -> list[Unit]:
    """The convolutions of the stem, a block or the head."""
    c_in, c_mid, c_out, side, out = layer.c_in, layer.c_mid, layer.c_out, layer.height, layer.height_out
    if layer.kind != "block":
        weights = layer.project_macs // out**2
        return [Unit(layer, layer.kind, batch, c_in, c_out, weights, side, out, layer.stride)]
    residual, expands = layer.residual, layer.expand_macs > 0
    forks = residual and not expands
    found = [
        Unit(layer, "depthwise", batch, c_mid, c_mid, 9 * c_mid, side, out, layer.stride, forks=forks),
        Unit(layer, "project", batch, c_mid, c_out, c_mid * c_out, out, out, relu6=False, joins=residual),
    ]
    if expands:
        found.insert(0, Unit(layer, "expand", batch, c_in, c_mid, c_in * c_mid, side, side, forks=residual))
    return found


def torch_convolution(unit: Unit) -> Passes:
    """A kernel for the output and one for each gradient; nobody needs the image's."""
    grads = [unit.row("weight grad", unit.z + unit.x, unit.w)]
    if unit.layer.kind != "stem":
        grads.insert(0, unit.row("input grad", unit.z + unit.w, unit.x))
    return Passes([unit.row("conv", unit.x + unit.w, unit.z)], grads)


def our_row(layer: LayerShape, op: str, shape: str, call: Call) -> Row:
    at = call.formula
    return Row(layer.name, layer.kind, op, "triton", shape, at.read, at.written, at.loaded + at.stored)


def our_convolution(unit: Unit) -> Passes:
    """The depthwise convolution by our kernels, any other by torch."""
    if unit.op != "depthwise":
        return torch_convolution(unit)
    rows = [our_row(unit.layer, f"{unit.op} {call.name}", unit.shape, call) for call in depthwise_calls(unit, META)]
    return Passes(rows[:1], rows[1:])


def depthwise_calls(unit: Unit, device: torch.device) -> list[Call]:
    """Launches of a depthwise convolution on ``device``: the forward, both gradients, the sum of their partials."""

    def images(side: int) -> Tensor:
        shape = (unit.batch, unit.c_in, side, side)
        return torch.zeros(shape, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)

    x, dx, y, dy = (images(side) for side in (unit.side, unit.side, unit.side_out, unit.side_out))
    w, dw = (torch.zeros(unit.c_in, 1, 3, 3, device=device) for _ in range(2))
    how = (unit.stride, "symmetric")
    forward = depthwise_passes.depthwise_fwd_launch(x, w, y, *how)
    backward = depthwise_passes.depthwise_bwd_launch(dy, x, w, dx, *how)
    sums = backward.arguments["partials_ptr"], dw.view(-1, 9)
    return [
        Call("conv", forward, depthwise_passes.depthwise_fwd_bytes(x, w, y, *how)),
        Call("both grads", backward, depthwise_passes.depthwise_bwd_bytes(dy, x, w, dx, *how)),
        Call("sum partials", partials.sum_partials_launch(*sums), partials.sum_partials_bytes(*sums)),
    ]


def inference_calls(
    layer: LayerShape, batch: int, device: torch.device, *, tile_batch: int | None = None
) -> list[Call]:
    """Launches of a block or the head at inference on ``device``, with the tile for ``tile_batch`` pictures."""
    like = torch.empty(0, dtype=torch.float16, device=device)
    if layer.kind == "head":
        tensors = head_tensors(layer.c_in, layer.c_out, layer.height, batch, like)
        launch = head_inference.conv_relu6_mean_launch(*tensors)
        return [Call("head", launch, head_inference.conv_relu6_mean_bytes(*tensors))]
    block = block_of(layer)
    x, packed, y = block_tensors(block, batch, like)
    planned, _, _ = block_tensors(block, tile_batch or batch, like.to(META))
    tile = chosen_tile(planned, packed, block.stride)
    how = (block.stride, block.residual, "symmetric")
    launches = inverted_residual_launches(x, packed, y, *how, relu6_input=not block.expands, tile=tile)
    formulas = inverted_residual_bytes(x, packed, y, *how, tile=tile)
    return [Call(*call) for call in zip(("block", "block project"), launches, formulas, strict=False)]


def joined(parts: Iterable[Passes]) -> Passes:
    """``parts`` one after the other, and backward the other way round."""
    parts = list(parts)
    forward = [row for part in parts for row in part.forward]
    return Passes(forward, [row for part in reversed(parts) for row in part.backward])


Execution = Callable[[LayerShape, int, bool], Passes]  # rows of the stem, a block or the head at a batch, in training?


def eager(
    layer: LayerShape,
    batch: int,
    training: bool,
    *,
    convolution: Callable[[Unit], Passes] = torch_convolution,
    norm_reads: int = 2,
    clones: bool = True,
) -> Passes:
    """One kernel for each op; ``norm_reads`` and ``clones`` are training's."""
    reads, copies = (norm_reads, 1 + clones) if training else (1, 1)

    def passes(unit: Unit) -> Passes:
        x, z = unit.x, unit.z
        forward, backward = convolution(unit)
        forward = [*forward, unit.row("norm", reads * z, z)]
        backward = [unit.row("norm grad", 2 * reads * z, z), *backward]
        if unit.relu6:
            forward.append(unit.row("relu6", copies * z, copies * z))
            backward.insert(0, unit.row("relu6 grad", 2 * z, z))
        if unit.joins:
            forward.append(unit.row("add", 2 * z, z))
        if unit.forks:
            backward.append(unit.row("add grads", 2 * x, x))
        return Passes(forward, backward)

    return joined(map(passes, units(layer, batch)))


def ours(layer: LayerShape, batch: int, training: bool) -> Passes:
    """This version: the folded network at inference; in training our blocks between an eager stem and head."""
    if training:
        return trained(layer, batch) if layer.kind == "block" else eager(layer, batch, training)
    there = units(layer, batch)
    if layer.kind == "stem":
        return Passes(torch_convolution(there[0]).forward, [])
    first, last = there[0], there[-1]
    shape = f"{layer.c_in}x{first.side}x{first.side} -> {layer.c_out}x{last.side_out}x{last.side_out}"
    return Passes([our_row(layer, call.name, shape, call) for call in inference_calls(layer, batch, META)], [])


def block_of(layer: LayerShape) -> Block:
    """Shape of a block of the network."""
    return Block(layer.c_in, layer.c_mid, layer.c_out, layer.height, layer.stride)


def trained(layer: LayerShape, batch: int) -> Passes:
    """The passes of a block in training."""
    shape = f"{layer.c_in}x{layer.height}x{layer.width} -> {layer.c_out}x{layer.height_out}x{layer.width_out}"
    like = torch.empty(0, dtype=torch.float16, device=META)
    passes = passes_of(block_of(layer), batch, like)
    return Passes(*([our_row(layer, call.name, shape, call) for call in calls] for calls in passes))


def compiled(layer: LayerShape, batch: int, training: bool) -> Passes:
    """Eager convolutions; BatchNorm, ReLU6 and the sum are one kernel, in training behind one that reduces."""

    def passes(unit: Unit) -> Passes:
        x, z = unit.x, unit.z
        forward, backward = torch_convolution(unit)
        if training:
            forward.append(unit.row("statistics", z, 0))
        forward.append(unit.row("pointwise", 2 * z if unit.joins else z, z))
        backward = [unit.row("sums", 2 * z, 0), unit.row("pointwise grad", 2 * z, z), *backward]
        if unit.forks:
            backward.append(unit.row("add grads", 2 * x, x))
        return Passes(forward, backward)

    return joined(map(passes, units(layer, batch)))


def epilogue(layer: LayerShape, batch: int, training: bool) -> Passes:
    """Convolutions with all else in their epilogues and loads."""

    def passes(unit: Unit) -> Passes:
        x, z, w = unit.x, unit.z, unit.w
        forward = [unit.row("conv", x + w + (z if unit.joins and not training else 0), z)]
        if unit.joins and training:
            forward.append(unit.row("norm and add", 2 * z, z))
        backward = [unit.row("weight grad", 2 * z + x, w)]
        if layer.kind != "stem":
            backward.insert(0, unit.row("input grad", 2 * z + w + x + (x if unit.forks else 0), x))
        if layer.kind == "head":
            backward.insert(0, unit.row("sums", 2 * z, 0))  # no convolution lies behind it that could make them
        return Passes(forward, backward)

    return joined(map(passes, units(layer, batch)))


def compulsory(layer: LayerShape, batch: int, training: bool) -> Passes:
    """One kernel a layer and direction."""
    there = units(layer, batch)
    x, y, w = there[0].x, there[-1].z, sum(unit.w for unit in there)
    row, dx = there[0].row, 0 if layer.kind == "stem" else x
    return Passes([row("forward", x + w, y)], [row("backward", x + y + w, dx + w)])


def pool(head: LayerShape, batch: int) -> Passes:
    """The mean over the head's pixels."""
    (unit,), mean = units(head, batch), batch * head.c_out * HALF
    return Passes([unit.row("pool", unit.z, mean)], [unit.row("pool grad", mean, unit.z)])


def linear(layer: LayerShape, batch: int) -> Passes:
    """The classifier's product: one kernel, and one for each gradient."""
    x, y, w = (number * HALF for number in (batch * layer.c_in, batch * layer.c_out, (layer.c_in + 1) * layer.c_out))
    row = partial(Row, layer.name, layer.kind, by="torch", shape=f"{layer.c_in} -> {layer.c_out}")
    return Passes(
        [row(op="linear", read=x + w, written=y)],
        [row(op="linear input grad", read=y + w, written=x), row(op="linear weight grad", read=y + x, written=w)],
    )


def rows_of(execution: Execution, layers: Sequence[LayerShape], batch: int, training: bool) -> list[Row]:
    """All rows of the network in the order in which they run."""
    *convolutional, classifier = layers
    parts = [execution(layer, batch, training) for layer in convolutional]
    if training or execution is not ours:  # there the head's kernel makes the mean
        parts.append(pool(convolutional[-1], batch))
    forward, backward = joined([*parts, linear(classifier, batch)])
    return forward + backward if training else forward


def totals(rows: Sequence[Row], batch: int) -> dict[str, float]:
    """MB an image of the 17 blocks, and of the network."""
    blocks = [row for row in rows if row.kind == "block"]
    return {
        name: sum(row.read + row.written for row in some) / batch / MB
        for name, some in (("blocks", blocks), ("network", rows))
    }


def totals_of_passes(rows: Sequence[Row], batch: int) -> dict[str, float]:
    """MB an image of each pass of our kernels in all blocks, in the order in which they first run."""
    found: dict[str, float] = {}
    for row in rows:
        if row.kind == "block" and row.by == "triton":
            found[row.op] = found.get(row.op, 0.0) + (row.read + row.written) / batch / MB
    return found


def executions(training: bool) -> dict[str, Execution]:
    """What stands beside ours, from the least to the most."""
    beside: dict[str, Execution] = {"compulsory": compulsory, "epilogue": epilogue, "compiled": compiled}
    if training:
        beside["eager_least"] = partial(eager, norm_reads=1, clones=False)
        beside["depthwise"] = partial(eager, convolution=our_convolution)
    return {**beside, "eager": eager}
