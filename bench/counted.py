"""What needs no GPU to be known, as the report shows it: traffic, saved memory, bounds, and the cost of each variant.

All of it is of alpha 1.0 at 224 pixels in half precision but the variants' cost. Traffic is counted here and now.
Saved memory is found in Triton's interpreter and bounds with the compiler, so both are read from their records, and
that of memory is made again where it is of another torch or of another network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from kernels import roofline
from kernels.roofline import SCHEDULERS, Bounds, Device
from mnv2.errors import InputError, RunError
from mnv2.model import LayerShape, layer_shapes
from mnv2.registry import PUBLISHED

from . import executions
from .cases import BATCH, Case, blocks_of_network, case_of, training_passes
from .figures import run_interpreted
from .traffic import shape_of

ALPHA, RESIZE = 1.0, 224
MODES = ("inference", "training")
CAP = 90  # the capability whose bounds are shown
SHOWN = ("ours", "compulsory", "epilogue", "compiled", "eager")  # executions, as bench/executions.py describes them
SAVED = ("eager", "D", "X")  # what is kept, as bench/memory.py describes it
SCOPES = ("blocks", "network")
LANES = 32  # of a warp: multiply-adds in fp32 of one instruction
MACS_OF_TRAINING = 3  # times those of the forward: there are two gradients too


class Variant(NamedTuple):
    """A published variant: accuracy in percent (Google's), and what an image costs at inference, the network whole."""

    alpha: float
    resize: int
    top1: float
    macs: int
    traffic_mb: float


class Point(NamedTuple):
    """Work on a roofline: multiply-adds, bytes of device memory and seconds, of one image or of one launch."""

    macs: float
    nbytes: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Multiply-adds a byte."""
        return self.macs / self.nbytes

    @property
    def throughput(self) -> float:
        """Multiply-adds a second."""
        return self.macs / self.seconds


class Bound(NamedTuple):
    """Microseconds an image that the 17 blocks take at least: by each launch's largest bound, bytes, instructions.

    ``other`` is what the bytes of another execution take at least: perfect epilogues at inference, in training
    compiled.
    """

    ours: float
    hbm: float
    issue: float
    other: float


def macs_of_issue(device: Device) -> float:
    """Multiply-adds in fp32 a second of a device that issues nothing else."""
    return device.processors * device.clock * SCHEDULERS * LANES


def macs_of_tensor_cores(device: Device) -> float:
    """Multiply-adds in half precision a second."""
    return device.processors * device.clock * device.group_macs


def traffic(mode: str) -> dict[str, dict[str, float]]:
    """MB an image by execution and scope."""
    layers, training = layer_shapes(ALPHA, RESIZE), mode == "training"
    every = {"ours": executions.ours, **executions.executions(training)}
    return {name: executions.totals(executions.rows_of(every[name], layers, BATCH, training), BATCH) for name in SHOWN}


def variants() -> Iterator[Variant]:
    """All published variants, by alpha and resolution."""
    for (alpha, resize), accuracies in PUBLISHED.items():
        layers = layer_shapes(alpha, resize)
        moved = executions.totals(executions.rows_of(executions.ours, layers, BATCH, False), BATCH)["network"]
        yield Variant(alpha, resize, accuracies["Google"].top1, sum(layer.macs for layer in layers), moved)


def memory(path: Path, *, refresh: bool) -> dict[str, dict[str, float]]:
    """MiB an image by scope and mode, of the record at ``path``; ``refresh`` makes a missing or stale one again.

    Raises:
        InputError: the file is no such record.
        RunError: it is missing or stale and not to be made again, or making it failed.
    """
    if reason := _stale(path):
        if not refresh:
            raise RunError(f"{reason}: python -m bench.report makes it again")
        words = ["--alpha", str(ALPHA), "--resize", str(RESIZE), "--json", os.path.relpath(path)]
        if status := run_interpreted("bench.memory", words):
            raise RunError(f"{reason}; making it again by python -m bench.memory failed with status {status}")
    record = _load(path)
    try:
        return {scope: {mode: float(record[f"{scope}_saved_mib_{mode}"]) for mode in SAVED} for scope in SCOPES}
    except (KeyError, TypeError, ValueError) as error:
        raise _no_record(path, "bench.memory", error) from None


def _stale(path: Path) -> str:
    """Why the record of memory can't be taken, or nothing."""
    if not path.exists():
        return f"{path}: no such record"
    record = _load(path)
    try:
        wanted = {name: version(name).partition("+")[0] for name in ("torch", "triton")}
        found = {name: record["versions"][name].partition("+")[0] for name in wanted}
        shape = record["alpha"], record["resize"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_record(path, "bench.memory", error) from None
    if shape != (ALPHA, RESIZE):
        return f"{path}: expected alpha {ALPHA} at {RESIZE}, got alpha {shape[0]} at {shape[1]}"
    different = [f"{name} {found[name]}, here is {wanted[name]}" for name in wanted if found[name] != wanted[name]]
    return f"{path}: of {', '.join(different)}" if different else ""


def bounds(path: Path) -> dict[str, Bound]:
    """Bounds of the 17 blocks by mode, of the record of ``bench.aot``."""
    record = _load(path)
    try:
        inference, training = (record[f"{kind}_bound_us"][str(CAP)] for kind in ("blocks", "training"))
        found = [limit for limits in launches(path, "inference") for limit in limits]
        hbm, issue = (1e6 * sum(getattr(limit, name) for limit in found) for name in ("hbm", "issue"))
        return {
            "inference": Bound(inference["ours"], hbm, issue, inference["separate"]),
            "training": Bound(*(training[name] for name in ("ours", "hbm", "issue", "compiled"))),
        }
    except (KeyError, TypeError) as error:
        raise _no_record(path, "bench.aot", error) from None


def launches(path: Path, mode: str) -> list[list[Bounds]]:
    """Bounds of the launches of each of the 17 blocks, in seconds an image, of the record of ``bench.aot``."""
    rows = _rows(path)
    if mode == "training":
        blocks = [training_passes(layer, CAP) for layer in _blocks()]
    else:
        blocks = []
        for case in blocks_of_network(CAP):
            if case.kernel == "block":  # the first launch of one
                blocks.append([])
            blocks[-1].append(case)
    for case in chain.from_iterable(blocks):
        if case not in rows:
            raise InputError(f"{path}: expected a row of {case.name}: python -m bench.aot --all makes it")
    return [[rows[case] for case in block] for block in blocks]


def points(path: Path, mode: str) -> list[Point]:
    """The 17 blocks as their bounds let them be at best, of an image."""
    bandwidth = roofline.DEVICES[CAP].bandwidth
    macs = macs_of_blocks(mode)
    return [
        Point(macs[shape_of(layer)], sum(limit.hbm for limit in limits) * bandwidth, sum(map(max, limits)))
        for layer, limits in zip(_blocks(), launches(path, mode), strict=True)
    ]


def macs_of_blocks(mode: str) -> dict[str, int]:
    """Multiply-adds of a block for an image by its shape, without what our kernels compute again."""
    times = MACS_OF_TRAINING if mode == "training" else 1
    return {shape_of(layer): times * layer.macs for layer in _blocks()}


def _blocks() -> list[LayerShape]:
    return [layer for layer in layer_shapes(ALPHA, RESIZE) if layer.kind == "block"]


def _rows(path: Path) -> dict[Case, Bounds]:
    """Bounds of the rows of the capability, in seconds an image."""
    try:
        return {
            case_of(row): Bounds(*(row[f"{name}_us"] / 1e6 for name in Bounds._fields))
            for row in _load(path)["rows"]
            if row["cap"] == CAP
        }
    except (KeyError, TypeError) as error:
        raise _no_record(path, "bench.aot", error) from None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None


def _no_record(path: Path, module: str, error: Exception) -> InputError:
    return InputError(f"{path}: expected a record of {module}, got {type(error).__name__}: {error}")
