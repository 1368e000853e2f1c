"""Device-memory traffic of MobileNetV2 in MB (10^6 bytes) an image, in half precision: ours, and others beside it.

    python -m bench.traffic --mode inference|training --alpha A --resize R [--batch 256] [--variants] [--count]
                            [--json FILE]

Beside ours stand the other executions of ``bench/executions.py``, which says what each of them is charged for.

In training each block of ours is a row for each pass, and the sum of every pass over the blocks follows. ``--variants``
adds the totals of all published variants, and ``--count`` checks the formulas: it runs our kernels in Triton's
interpreter and counts what they touch.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kernels import common
from mnv2.errors import RunError, exit_status
from mnv2.flags import option, parse
from mnv2.model import VARIANTS, LayerShape, layer_shapes

from .count import Call, differing, differs
from .executions import (
    MB,
    block_of,
    depthwise_calls,
    executions,
    inference_calls,
    ours,
    rows_of,
    totals,
    totals_of_passes,
    units,
)
from .figures import check_sizes, run_interpreted, write
from .training import passes_of

# Of the picture at most: the interpreter takes minutes, and sides are even and odd.
COUNTED_SIDE = {"inference": 96, "training": 56}


@dataclass(frozen=True)
class TrafficConfig:
    """What is modelled."""

    mode: str = option("inference", "what the network does", choices=("inference", "training"))
    alpha: float = option(1.0, "width multiplier")
    resize: int = option(224, "side of the network's input in pixels")
    batch: int = option(256, "pictures in a batch")
    variants: bool = option(False, "the totals of all published variants too")
    count: bool = option(False, "run our kernels in Triton's interpreter and hold the formulas to what they touch")
    json: str | None = option(None, "write the figures there", metavar="FILE")

    def __post_init__(self) -> None:
        check_sizes(self.alpha, resize=self.resize, batch=self.batch)

    @property
    def training(self) -> bool:
        return self.mode == "training"


def report(config: TrafficConfig) -> dict[str, Any]:
    """Figures of all executions and the rows of ours."""
    layers = layer_shapes(config.alpha, config.resize)
    rows = rows_of(ours, layers, config.batch, config.training)
    total = totals(rows, config.batch)
    figures = {
        "mode": config.mode,
        "alpha": config.alpha,
        "resize": config.resize,
        "batch": config.batch,
        "dtype": "float16",
        "blocks_mb_per_image": total["blocks"],
        "network_mb_per_image": total["network"],
        "rows": [{**asdict(row), "mb_per_image": (row.read + row.written) / config.batch / MB} for row in rows],
        "beside": beside(config, layers),
    }
    if config.training:
        figures["passes_mb_per_image"] = totals_of_passes(rows, config.batch)
    if config.variants:
        figures["variants"] = [variant(config, alpha, resize) for alpha, sides in VARIANTS.items() for resize in sides]
    return figures


def beside(config: TrafficConfig, layers: Sequence[LayerShape]) -> dict[str, dict[str, float]]:
    """Totals of the other executions."""
    return {
        name: totals(rows_of(execution, layers, config.batch, config.training), config.batch)
        for name, execution in executions(config.training).items()
    }


def variant(config: TrafficConfig, alpha: float, resize: int) -> dict[str, Any]:
    """Totals of all executions of a variant, at the batch and in the mode of ``config``."""
    layers = layer_shapes(alpha, resize)
    mine = totals(rows_of(ours, layers, config.batch, config.training), config.batch)
    return {"alpha": alpha, "resize": resize, "ours": mine, **beside(config, layers)}


def table(figures: dict[str, Any]) -> Iterator[str]:
    """Lines for a reader; all in MB an image."""
    columns = "{:12} {:24} {:7} {:28} {:>9} {:>9} {:>10} {:>9}"
    yield columns.format("block", "op", "by", "shape", "read", "written", "requested", "MB/image")
    for row in figures["rows"]:
        sizes = (row[name] for name in ("read", "written", "requested"))
        read, written, requested = ("" if size is None else f"{size / figures['batch'] / MB:.4f}" for size in sizes)
        where = (row[name] for name in ("block", "op", "by", "shape"))
        yield columns.format(*where, read, written, requested, f"{row['mb_per_image']:.4f}")
    if passes := figures.get("passes_mb_per_image"):
        yield "\npasses of all blocks: MB an image"
        yield from (f"{name:12} {megabytes:8.4f}" for name, megabytes in passes.items())
    yield "\n{mode}, alpha {alpha}, {resize} px, batch {batch}, {dtype}: MB an image".format(**figures)
    yield f"{'':12} {'blocks':>8} {'network':>8}"
    mine = {"blocks": figures["blocks_mb_per_image"], "network": figures["network_mb_per_image"]}
    for name, total in {"ours": mine, **figures["beside"]}.items():
        yield f"{name:12} {total['blocks']:8.2f} {total['network']:8.2f}"
    yield from variants_table(figures.get("variants", []))


def variants_table(variants: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a variant: what its blocks and the network move in each execution."""
    if not variants:
        return
    names = [name for name in variants[0] if name not in ("alpha", "resize")]
    yield "\nall variants: blocks, then the network"
    yield f"{'alpha':>5} {'px':>4}" + "".join(f" {name:>12}" for name in names * 2)
    for one in variants:
        cells = [one[name][scope] for scope in ("blocks", "network") for name in names]
        yield f"{one['alpha']:5} {one['resize']:4}" + "".join(f" {cell:12.2f}" for cell in cells)


def our_calls(config: TrafficConfig, side: int) -> Iterator[Call]:
    """Launches for one picture of ``side`` that need no other's result, those of a shape once.

    At inference these are ours, with the batch's tiles; in training the depthwise convolution's.
    """
    seen, cpu = set(), torch.device("cpu")
    for layer in layer_shapes(config.alpha, side):
        if config.training:
            there = [unit for unit in units(layer, 1) if unit.op == "depthwise"]
            calls = [
                (f"{unit.op} {call.name} {unit.shape}", call) for unit in there for call in depthwise_calls(unit, cpu)
            ]
        elif layer.kind in ("block", "head"):
            there = inference_calls(layer, 1, cpu, tile_batch=config.batch)
            calls = [(f"{call.name} {shape_of(layer)}", call) for call in there]
        else:
            continue
        yield from (call._replace(name=f"{layer.name} {what}") for what, call in calls if what not in seen)
        seen |= {what for what, _ in calls}


def shape_of(layer: LayerShape) -> str:
    """Channels, pixels and stride of a block or the head."""
    return f"{layer.c_in}-{layer.c_mid}-{layer.c_out}x{layer.height}x{layer.width}/{layer.stride}"


def differing_passes(config: TrafficConfig, side: int) -> list[str]:
    """Run the blocks of a shape once in training on a picture of ``side``; names of passes whose formulas are wrong."""
    wrong, like = [], torch.empty(0, dtype=torch.float16)
    blocks: dict[str, LayerShape] = {}
    for layer in layer_shapes(config.alpha, side):
        if layer.kind == "block":
            blocks.setdefault(shape_of(layer), layer)

    def check_pass(call: Call, where: str) -> None:
        if differs(named := call._replace(name=f"{where} {call.name}")):
            wrong.append(named.name)

    for shape, layer in blocks.items():
        where = f"{layer.name} {shape}"
        passes_of(block_of(layer), 1, like, visit=functools.partial(check_pass, where=where))
    return wrong


def check(config: TrafficConfig) -> None:
    """Hold the formulas to what is counted; RunError names those that are wrong."""
    side = min(config.resize, COUNTED_SIDE[config.mode])
    print(f"\nbytes counted / by formula, batch 1, {side} px" + (" (capped)" if side < config.resize else ""))
    wrong = differing(our_calls(config, side))
    if config.training:
        wrong += differing_passes(config, side)
    if wrong:
        raise RunError(f"formula and count differ: {'; '.join(wrong)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(TrafficConfig, words, "Device-memory traffic of MobileNetV2.")
    if config.count and not common.INTERPRETED:
        return run_interpreted("bench.traffic", words)

    def action() -> None:
        figures = report(config)
        print("\n".join(table(figures)))
        if config.count:
            check(config)
        if config.json is not None:
            write(config.json, "bench.traffic", words, figures)

    return exit_status("bench.traffic", action)


if __name__ == "__main__":
    sys.exit(main())
