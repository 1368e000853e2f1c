"""Device-memory traffic of MobileNetV2 in MB (10^6 bytes) an image, in half precision: ours, and others beside it.

    python -m bench.traffic --mode inference|training --alpha A --resize R [--batch 256] [--count] [--json FILE]

An execution is a list of rows, one for each kernel in the order in which they run. A kernel is charged for each tensor
that it reads or writes once (caches are perfect inside a kernel, and keep nothing from one to the next), at a batch, by
which all is divided: so are weights. Executions:

ours         eager, but the depthwise convolution is `kernels.depthwise`: its forward, and in training both gradients in
             one pass with the sum of its partials. Bytes are those of the formulas beside its launchers; the partials'
             number is that of a grid for an H100.
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

In all of them the image is read in half precision, pooling is a kernel of its own, and so is the classifier's product.
Weights are in half precision, those of our kernels in fp32. Left out, as the same in all or negligible: AMP's casts of
weights, a BatchNorm's few numbers a channel, dropout, the loss, the optimizer.

``--count`` checks the formulas: it runs our kernels in Triton's interpreter and counts what they touch.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import common, depthwise, partials
from mnv2.config import InputError, RunError, exit_status, option, parse
from mnv2.logs import versions
from mnv2.model import LayerShape, check_alpha, layer_shapes

from .count import Call, differing

MB = 1e6
HALF = torch.float16.itemsize
COUNTED_SIDE = 96  # of the picture at most: the interpreter takes a minute or two, and sides are even and odd
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


def our_convolution(unit: Unit) -> Passes:
    """The depthwise convolution by our kernels, any other by torch."""
    if unit.op != "depthwise":
        return torch_convolution(unit)
    rows = []
    for call in depthwise_calls(unit, META):
        at = call.formula
        name, requested = f"{unit.op} {call.name}", at.loaded + at.stored
        rows.append(Row(unit.layer.name, unit.layer.kind, name, "triton", unit.shape, at.read, at.written, requested))
    return Passes(rows[:1], rows[1:])


def depthwise_calls(unit: Unit, device: torch.device) -> list[Call]:
    """Launches of a depthwise convolution on ``device``: the forward, both gradients, the sum of their partials."""

    def images(side: int) -> Tensor:
        shape = (unit.batch, unit.c_in, side, side)
        return torch.zeros(shape, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)

    x, dx, y, dy = (images(side) for side in (unit.side, unit.side, unit.side_out, unit.side_out))
    w, dw = (torch.zeros(unit.c_in, 1, 3, 3, device=device) for _ in range(2))
    how = (unit.stride, "symmetric")
    forward = depthwise.depthwise_fwd_launch(x, w, y, *how)
    backward = depthwise.depthwise_bwd_launch(dy, x, w, dx, *how)
    sums = backward.arguments["partials_ptr"], dw.view(-1, 9)
    return [
        Call("conv", forward, depthwise.depthwise_fwd_bytes(x, w, y, *how)),
        Call("both grads", backward, depthwise.depthwise_bwd_bytes(dy, x, w, dx, *how)),
        Call("sum partials", partials.sum_partials_launch(*sums), partials.sum_partials_bytes(*sums)),
    ]


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
    """This version: every layer as eager, with our depthwise convolution."""
    return eager(layer, batch, training, convolution=our_convolution)


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
    forward, backward = joined([*parts, pool(convolutional[-1], batch), linear(classifier, batch)])
    return forward + backward if training else forward


def totals(rows: Sequence[Row], batch: int) -> dict[str, float]:
    """MB an image of the 17 blocks, and of the network."""
    blocks = [row for row in rows if row.kind == "block"]
    return {
        name: sum(row.read + row.written for row in some) / batch / MB
        for name, some in (("blocks", blocks), ("network", rows))
    }


def executions(training: bool) -> dict[str, Execution]:
    """What stands beside ours, from the least to the most."""
    beside: dict[str, Execution] = {"compulsory": compulsory, "epilogue": epilogue, "compiled": compiled}
    if training:
        beside["eager_least"] = partial(eager, norm_reads=1, clones=False)
    return {**beside, "eager": eager}


@dataclass(frozen=True)
class TrafficConfig:
    """What is modelled."""

    mode: str = option("inference", "what the network does", choices=("inference", "training"))
    alpha: float = option(1.0, "width multiplier")
    resize: int = option(224, "side of the network's input in pixels")
    batch: int = option(256, "pictures in a batch")
    count: bool = option(False, "run our kernels in Triton's interpreter and hold the formulas to what they touch")
    json: str | None = option(None, "write the figures there", metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("resize", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        try:
            check_alpha(self.alpha)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def training(self) -> bool:
        return self.mode == "training"


def report(config: TrafficConfig) -> dict[str, Any]:
    """Figures of all executions and the rows of ours."""
    layers = layer_shapes(config.alpha, config.resize)
    rows = rows_of(ours, layers, config.batch, config.training)
    total = totals(rows, config.batch)
    return {
        "mode": config.mode,
        "alpha": config.alpha,
        "resize": config.resize,
        "batch": config.batch,
        "dtype": "float16",
        "blocks_mb_per_image": total["blocks"],
        "network_mb_per_image": total["network"],
        "rows": [{**asdict(row), "mb_per_image": (row.read + row.written) / config.batch / MB} for row in rows],
        "beside": {
            name: totals(rows_of(execution, layers, config.batch, config.training), config.batch)
            for name, execution in executions(config.training).items()
        },
    }


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Lines for a reader; all in MB an image."""
    columns = "{:12} {:24} {:7} {:28} {:>9} {:>9} {:>10} {:>9}"
    yield columns.format("block", "op", "by", "shape", "read", "written", "requested", "MB/image")
    for row in figures["rows"]:
        sizes = (row[name] for name in ("read", "written", "requested"))
        read, written, requested = ("" if size is None else f"{size / figures['batch'] / MB:.4f}" for size in sizes)
        where = (row[name] for name in ("block", "op", "by", "shape"))
        yield columns.format(*where, read, written, requested, f"{row['mb_per_image']:.4f}")
    yield "\n{mode}, alpha {alpha}, {resize} px, batch {batch}, {dtype}: MB an image".format(**figures)
    yield f"{'':12} {'blocks':>8} {'network':>8}"
    mine = {"blocks": figures["blocks_mb_per_image"], "network": figures["network_mb_per_image"]}
    for name, total in {"ours": mine, **figures["beside"]}.items():
        yield f"{name:12} {total['blocks']:8.2f} {total['network']:8.2f}"


def our_calls(config: TrafficConfig, side: int) -> Iterator[Call]:
    """Launches of ours for one picture of ``side``, those of a shape once."""
    seen = set()
    for layer in layer_shapes(config.alpha, side):
        for unit in units(layer, 1) if layer.kind == "block" else ():
            if unit.op == "depthwise" and (unit.shape, unit.stride) not in seen:
                seen.add((unit.shape, unit.stride))
                for call in depthwise_calls(unit, torch.device("cpu"))[: None if config.training else 1]:
                    yield call._replace(name=f"{layer.name} {unit.op} {call.name} {unit.shape}")


def check(config: TrafficConfig) -> None:
    """Hold the formulas to what is counted; RunError names those that are wrong."""
    side = min(config.resize, COUNTED_SIDE)
    print(f"\nbytes counted / by formula, batch 1, {side} px" + (" (capped)" if side < config.resize else ""))
    if wrong := differing(our_calls(config, side)):
        raise RunError(f"formula and count differ: {'; '.join(wrong)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(TrafficConfig, words, "Device-memory traffic of MobileNetV2.")
    command = [sys.executable, "-m", "bench.traffic", *words]
    if config.count and not common.INTERPRETED:
        # Triton reads the variable where kernels are defined, which is done: once more, in a process of its own.
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode

    def action() -> None:
        figures = report(config)
        print("\n".join(table(figures)))
        if config.count:
            check(config)
        if config.json is not None:
            figures |= {"command": shlex.join(["python", *command[1:]]), "versions": versions()}
            with open(config.json, "w") as file:
                file.write(json.dumps(figures, indent=2) + "\n")

    return exit_status("bench.traffic", action)


if __name__ == "__main__":
    sys.exit(main())
