"""Plots of what was measured and of what is counted, as figures of matplotlib and as bytes of SVG and PNG.

A bound is a hollow circle and a measurement a filled diamond, in every plot and for nothing else. Colours are those of
Okabe and Ito, which the colour-blind tell apart; on grey paper hatches and the shapes of marks do the same.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from kernels import roofline

from . import counted, tables

BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, PURPLE, ORANGE = "#D55E00", "#CC79A7", "#E69F00"
GREY = "#595959"
BOUND = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": BLUE, "markersize": 7, "markeredgewidth": 1.5}
MEASURED = {"marker": "D", "markeredgecolor": "black", "markersize": 6, "markeredgewidth": 0.5}
OF_DEVICES = (VERMILION, GREEN, PURPLE, ORANGE, SKY)
OF_ALPHAS = {  # colour, mark
    1.4: (GREY, "h"),
    1.3: (PURPLE, "P"),
    1.0: (VERMILION, "s"),
    0.75: (BLUE, "^"),
    0.5: (GREEN, "v"),
    0.35: (ORANGE, "X"),
}
OF_VARIANTS = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.7, "linewidth": 1.5}
NAMES = {"epilogue": "perfect\nepilogues", "D": 'save="D"', "X": 'save="X"'}
BLOCK = re.compile(r"(inference|training) block (\S+) fp16, batch (\d+)")  # a case of bench_kernels.py
STYLE = {
    "svg.hashsalt": "mnv2",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}
DPI = 120
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20)  # that an axis may show


def figures(results: Path, suites: Mapping[str, Sequence[tables.Row]], *, refresh: bool) -> dict[str, Figure]:
    """Every plot by name, of the measured ``suites`` and the records in ``results``."""
    record = results / "aot.json"
    with styled():
        return {
            "traffic": traffic({mode: counted.traffic(mode) for mode in counted.MODES}),
            "memory": memory(counted.memory(results / "memory.json", refresh=refresh)),
            "roofline": rooflines(
                {mode: counted.points(record, mode) for mode in counted.MODES}, measured_points(suites["kernels"])
            ),
            "accuracy": accuracy([*counted.variants()]),
            "ratios": ratios(suites),
        }


def render(plots: Mapping[str, Figure]) -> dict[str, bytes]:
    """Files by name, SVG and PNG of each plot; they hold no date."""
    found = {}
    for name, figure in plots.items():
        for kind in ("svg", "png"):
            file = io.BytesIO()
            with styled():
                figure.savefig(file, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
            found[f"{name}.{kind}"] = file.getvalue()
    return found


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's own defaults with ``STYLE``, whatever the user's configuration says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def panels(count: int, size: tuple[float, float], title: str, **settings: Any) -> tuple[Figure, Sequence[Axes]]:
    """A figure of ``count`` axes side by side."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(1, count, squeeze=False, **settings)[0]


def stacked(axes: Axes, found: Mapping[str, Mapping[str, float]], ours: Sequence[str], unit: str) -> None:
    """A bar for each name of ``found``: the blocks, and what the network has beside them."""
    names = list(found)
    blocks, network = ([found[name][scope] for name in names] for scope in counted.SCOPES)
    colours = [VERMILION if name in ours else SKY for name in names]
    rest = [whole - part for whole, part in zip(network, blocks, strict=True)]
    axes.barh(names, blocks, color=colours, edgecolor="black", linewidth=0.8)
    axes.barh(names, rest, left=blocks, color="white", edgecolor="black", linewidth=0.8, hatch="////")
    for place, (part, whole) in enumerate(zip(blocks, network, strict=True)):
        label = f"  {tables.number(whole)}  (blocks {tables.number(part)})"
        axes.text(whole, place, label, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(network))  # for the labels
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", length=0)


def bars_legend(figure: Figure) -> None:
    """What colours and hatches of ``stacked`` are."""
    handles = [
        Patch(facecolor=VERMILION, edgecolor="black", label="17 blocks, ours"),
        Patch(facecolor=SKY, edgecolor="black", label="17 blocks, others"),
        Patch(facecolor="white", edgecolor="black", hatch="////", label="stem, head, classifier"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def traffic(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """What executions move through device memory, at inference and in training."""
    title = f"Counted device-memory traffic: alpha {counted.ALPHA}, {counted.RESIZE} px, fp16, batch {counted.BATCH}"
    figure, every = panels(len(found), (10, 3.8), title)
    for axes, (mode, executions) in zip(every, found.items(), strict=True):
        stacked(axes, executions, ("ours",), "MB an image")
        axes.set_title(mode)
    bars_legend(figure)
    return figure


def memory(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """What the forward saves for the backward."""
    title = f"Counted memory saved for the backward: alpha {counted.ALPHA}, {counted.RESIZE} px, fp16"
    figure, (axes,) = panels(1, (7.5, 2.8), title)
    by_mode = {mode: {scope: found[scope][mode] for scope in found} for mode in counted.SAVED}
    stacked(axes, by_mode, ("D", "X"), "MiB an image")
    bars_legend(figure)
    return figure


def measured_points(rows: Sequence[tables.Row]) -> dict[str, dict[str, list[counted.Point]]]:
    """Measured blocks by mode, and by device and batch, of the rows of bench_kernels.py that are of one in fp16."""
    found: dict[str, dict[str, list[counted.Point]]] = {mode: {} for mode in counted.MODES}
    for row in rows:
        match = BLOCK.fullmatch(row["case"])
        if match is None or not {"counted_mb", "gb_per_s"} <= row.keys():
            continue
        mode, shape, batch = match.groups()
        if (macs := counted.macs_of_blocks(mode).get(shape)) is not None:
            nbytes = row["counted_mb"] * 1e6
            point = counted.Point(macs * int(batch), nbytes, nbytes / (row["gb_per_s"] * 1e9))
            found[mode].setdefault(f"{row['device']}, batch {batch}", []).append(point)
    return found


def rooflines(
    bounds: Mapping[str, Sequence[counted.Point]], measured: Mapping[str, Mapping[str, Sequence[counted.Point]]]
) -> Figure:
    """Blocks under the roofs of a device: bounds by mode, and what has been measured by mode and run."""
    device = roofline.DEVICES[counted.CAP]
    title = f"Roofline of {device.name}, with the 17 blocks of alpha {counted.ALPHA} at {counted.RESIZE} px in fp16"
    figure, every = panels(len(bounds), (11, 5), title, sharey=True)
    equal = f"bound of a block, counted, batch {counted.BATCH} (equal blocks lie on each other)"
    lines = {equal: Line2D([], [], linestyle="none", **BOUND)}
    runs = dict.fromkeys(run for there in measured.values() for run in there)
    colours = dict(zip(runs, itertools.cycle(OF_DEVICES), strict=False))
    for axes, (mode, points) in zip(every, bounds.items(), strict=True):
        roofs(axes, device)
        marks(axes, points, BOUND)
        for run, some in measured[mode].items():
            style = {**MEASURED, "markerfacecolor": colours[run]}
            marks(axes, some, style)
            lines[f"measured: {run}"] = Line2D([], [], linestyle="none", **style)
        if not measured[mode]:
            note(axes, "No GPU has been measured yet:\nall marks are bounds.")
        axes.set_title(mode if mode == "inference" else f"{mode}, forward and backward")
        axes.set_xlabel("multiply-adds a byte of counted device-memory traffic")
    every[0].set_ylabel("10¹² multiply-adds a second")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2)
    return figure


def roofs(axes: Axes, device: roofline.Device) -> None:
    """Lines above which ``device`` can't be: its memory, its tensor cores, its other multiply-adds."""
    span = (1.0, 1000.0)
    slope = device.bandwidth / 1e12
    flat = {
        "tensor cores, fp16": (counted.macs_of_tensor_cores(device) / 1e12, "-"),
        "without tensor cores, fp32": (counted.macs_of_issue(device) / 1e12, "--"),
    }
    top = counted.macs_of_tensor_cores(device) / 1e12
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot([span[0], top / slope], [span[0] * slope, top], color="black", lw=1.2)
    for name, (height, line) in flat.items():
        axes.plot([height / slope, span[1]], [height] * 2, color="black", linestyle=line, lw=1.2)
        axes.text(span[1], height * 1.06, name, ha="right", va="bottom", fontsize=9)
    axes.text(1.6, 1.6 * slope * 0.85, f"HBM, {slope:.2f} TB/s", va="top", fontsize=9)
    axes.set_xlim(*span)
    axes.set_ylim(2, 1000)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(color="#DDDDDD", linewidth=0.6)


def marks(axes: Axes, points: Sequence[counted.Point], style: Mapping[str, Any]) -> None:
    intensities, throughputs = ([getattr(point, name) for point in points] for name in ("intensity", "throughput"))
    axes.plot(intensities, [value / 1e12 for value in throughputs], linestyle="none", **style)


def note(axes: Axes, text: str) -> None:
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=10, style="italic")


def accuracy(variants: Sequence[counted.Variant]) -> Figure:
    """Published accuracy of all variants against what an image costs."""
    title = f"The {len(variants)} published variants: accuracy (Google's) against what an image costs at inference"
    figure, every = panels(2, (11, 5), title, sharey=True)
    costs = {
        "million multiply-adds": lambda variant: variant.macs / 1e6,
        f"MB of counted device-memory traffic (ours, fp16, batch {counted.BATCH})": lambda variant: variant.traffic_mb,
    }
    ticks = ((10, 20, 50, 100, 200, 500), (0.5, 1, 2, 5, 10))
    for axes, (name, cost), places in zip(every, costs.items(), ticks, strict=True):
        axes.set_xscale("log")
        for alpha, (colour, mark) in OF_ALPHAS.items():
            some = [variant for variant in variants if variant.alpha == alpha]
            costs_of, accuracies = [cost(variant) for variant in some], [variant.top1 for variant in some]
            axes.plot(costs_of, accuracies, color=colour, marker=mark, label=f"{alpha}", **OF_VARIANTS)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(name)
        axes.grid(color="#DDDDDD", linewidth=0.6)
    every[0].set_ylabel("top-1 accuracy on ImageNet, %")
    lines = every[0].get_legend_handles_labels()
    sides = "alpha; along a line 96, 128, 160, 192 and 224 px, of 1.3 and 1.4 224 px alone"
    figure.legend(*lines, title=sides, loc="outside lower center", ncols=6)
    return figure


def ratios(suites: Mapping[str, Sequence[tables.Row]]) -> Figure:
    """Measured ratios as marks with the spread of their rounds."""
    found = [
        (ratio["name"], device, ratio)
        for suite in tables.MEASURED
        for device, rows in tables.by_device(row for row in suites[suite] if row.get("ratios")).items()
        for row in rows
        for ratio in row["ratios"]
    ]
    devices = [*dict.fromkeys(device for _, device, _ in found)]
    where = f" on {devices[0]}" if len(devices) == 1 else ""
    title = f"Cost measured{where}, ours / theirs: median of the rounds' ratios, smallest to largest"
    figure, (axes,) = panels(1, (10, 1.6 + 0.28 * max(len(found), 2)), title)
    axes.set_xscale("log")
    for place, (_, device, ratio) in enumerate(found):
        colour = OF_DEVICES[devices.index(device) % len(OF_DEVICES)]
        axes.plot(ratio["ratio_min_max"], [place] * 2, color="black", lw=1.5)
        axes.plot(ratio["ratio"], place, linestyle="none", **MEASURED, markerfacecolor=colour)
    axes.axvline(1, color="black", lw=1, linestyle="--")
    if not found:
        note(axes, "No ratios have been recorded.")
    ends = [0.8, 1.25, *(end for _, _, ratio in found for end in ratio["ratio_min_max"])]
    axes.set_xlim(0.95 * min(ends), 1.05 * max(ends))
    labels = [f"{what}, on {device}" if len(devices) > 1 else what for what, device, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize=9)
    axes.set_ylim(max(len(found), 1) - 0.5, -0.5)
    axes.xaxis.set_major_locator(FixedLocator(RATIOS))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_xlabel("ours / theirs; under 1 ours costs less")
    return figure
