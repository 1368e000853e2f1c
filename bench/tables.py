"""Results as tables in Markdown: what was measured, with where and by which command, and what is counted.

A suite's rows are those of ``bench/results.py``. A table is of one device. Of CPUs the one on which a case was recorded
last has it; each GPU has a table of its own. Rows without ratios are left out of a table of ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from kernels import roofline
from mnv2.errors import InputError

from . import counted, results

Row = Mapping[str, Any]

MEASURED = ("loader", "evaluation", "host")  # suites whose tables are of ratios
GPU = ("kernels", "network")  # suites that need a GPU: figures, and ratios where there are any
NO_FIGURES = ("case", "ratios", "command", "commit", "versions", "device", "cores")
UNITS = {  # of a figure, by how its name ends
    "images_per_s": "images/s",
    "gb_per_s": "GB/s",
    "mb_per_image": "MB/image",
    "us": "µs",
    "mib": "MiB",
    "mb": "MB",
}
NO_GPU = "No speed on a GPU is claimed: none has been measured."
EXECUTIONS = {"epilogue": "perfect epilogues"}  # names of executions that need other words


def measured(folder: Path) -> dict[str, list[Row]]:
    """Rows of each suite in the folder of results, as they were recorded.

    Raises:
        InputError: a file isn't one of results.
    """
    found: dict[str, list[Row]] = {}
    for suite in (*MEASURED, *GPU):
        path = folder / f"{suite}.json"
        found[suite] = results.read(path)
        try:
            for row in found[suite]:  # what can't be shown is found here, where the file is known
                about_run(row)
                ratios_table([{"ratios": [], **row}])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: expected results of benchmarks, got {type(error).__name__}: {error}") from None
    return found


def all_tables(folder: Path, suites: Mapping[str, Sequence[Row]], *, refresh: bool) -> dict[str, str]:
    """Every table by its name, of the measured ``suites`` and of the records in ``folder``."""
    tables = {suite: suite_tables(suite, suites[suite]) for suite in MEASURED}
    tables["gpu"] = "\n\n".join(gpu_tables(suites)) or NO_GPU
    tables["traffic"] = traffic_table()
    tables["memory"] = memory_table(counted.memory(folder / "memory.json", refresh=refresh))
    tables["bounds"] = bounds_table(counted.bounds(folder / "aot.json"))
    return tables


def number(value: float) -> str:
    """Three significant digits, without an exponent where there is a reader."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def ratio_cell(ratio: Row) -> str:
    low, high = ratio["ratio_min_max"]
    return f"{ratio['ratio']:.2f} ({low:.2f} to {high:.2f})"


def about_run(row: Row) -> str:
    """Device, command and commit of a row."""
    device, cores = row["device"], row["cores"]
    commit, _, state = row["commit"].partition("-")
    changed = f" with changes ({state})" if state else ""
    where = device if is_gpu(device) else f"{device}, {cores} {'core' if cores == 1 else 'cores'}"
    return f"{where}; `{row['command']}` at commit `{commit[:7]}`{changed}"


def is_gpu(device: str) -> bool:
    """Whether this is a GPU's name, which begins with NVIDIA then; processors' don't."""
    return device.startswith("NVIDIA")


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each device; of a case's CPUs the last recorded one has it."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["case"], row["device"] if is_gpu(row["device"]) else "")
        kept.pop(key, None)  # so that it stands where it was recorded last
        kept[key] = row
    found: dict[str, list[Row]] = {}
    for row in kept.values():
        found.setdefault(row["device"], []).append(row)
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def sources(rows: Iterable[Row]) -> str:
    """A line for each run that the rows come from."""
    return "\n".join(f"{line}." for line in dict.fromkeys(map(about_run, rows)))


def suite_tables(suite: str, rows: Sequence[Row]) -> str:
    """Tables of a suite's ratios, one a device."""
    tables = [
        f"{ratios_table(some)}\n\n{sources(some)}"
        for some in by_device(row for row in rows if row.get("ratios")).values()
    ]
    return "\n\n".join(tables) or f"No ratios have been recorded: `pytest bench/bench_{suite}.py --record` does it."


def ratios_table(rows: Iterable[Row]) -> str:
    """Ratios of rows by their names, which say what they are of, without what all names begin with."""
    ratios = [ratio for row in rows for ratio in row["ratios"]]
    units = {ratio["unit"] for ratio in ratios}
    said = common_words([ratio["name"] for ratio in ratios])
    cells = [
        [
            ratio["name"][said:] + (f", {ratio['unit']}" if len(units) > 1 else ""),
            number(ratio["ours"]),
            number(ratio["theirs"]),
            ratio_cell(ratio),
        ]
        for ratio in ratios
    ]
    unit = "" if len(units) > 1 else "".join(units)
    return markdown([unit, "ours", "theirs", "ours / theirs (min to max)"], cells)


def common_words(names: Sequence[str]) -> int:
    """Length of what several names begin with, up to a comma or a colon."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)) if len(names) > 1 else ()
    shared = "".join(letters[0] for letters in same)
    return max(shared.rfind(mark) + len(mark) if mark in shared else 0 for mark in (", ", ": "))


def gpu_tables(suites: Mapping[str, Sequence[Row]]) -> Iterable[str]:
    """Tables of the suites that need a GPU, figures and ratios of each device; those of many kernels fold up."""
    for suite in GPU:
        for device, rows in by_device(suites[suite]).items():
            having = [row for row in rows if row.get("ratios")]
            parts = [figures_table(rows), *([ratios_table(having)] if having else []), sources(rows)]
            if suite == "kernels":
                summary = f"<summary>{len(rows)} cases of kernels on {device}</summary>"
                parts = [f"<details>{summary}", *parts, "</details>"]
            yield "\n\n".join(parts)


def figures_table(rows: Sequence[Row]) -> str:
    """All numbers of rows by their names."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if is_figure(name, value))
    cells = [[row["case"], *(number(row[name]) if name in row else "" for name in names)] for row in rows]
    return markdown(["", *map(heading, names)], cells)


def is_figure(name: str, value: object) -> bool:
    return name not in NO_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)


def heading(name: str) -> str:
    """A figure's name in words, with its unit."""
    for suffix, unit in UNITS.items():
        if name == suffix:
            return unit
        if name.endswith(f"_{suffix}"):
            return f"{name.removesuffix(f'_{suffix}').replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


def traffic_table() -> str:
    """MB an image of ours and others."""
    cells = []
    for mode in counted.MODES:
        found = counted.traffic(mode)
        for scope, what in (("blocks", "17 blocks"), ("network", "network")):
            cells.append([f"{mode}, {what}", *(number(found[name][scope]) for name in counted.SHOWN)])
    table = markdown(["MB an image", *(EXECUTIONS.get(name, name) for name in counted.SHOWN)], cells)
    return f"{table}\n\nCounted: `python -m bench.traffic --mode inference`, and `--mode training`."


def memory_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """MiB an image that is saved for the backward."""
    names = [mode if mode == "eager" else f'`save="{mode}"`' for mode in counted.SAVED]
    cells = [
        [what, *(number(found[scope][mode]) for mode in counted.SAVED)]
        for scope, what in (("blocks", "17 blocks"), ("network", "network"))
    ]
    return f"{markdown(['MiB an image', *names], cells)}\n\nCounted: `python -m bench.memory`."


def bounds_table(found: Mapping[str, counted.Bound]) -> str:
    """Microseconds an image that the 17 blocks take at least."""
    header = [
        f"µs an image on {roofline.DEVICES[counted.CAP].name}, at least",
        "ours, each launch's largest bound",
        "ours, bytes alone",
        "ours, instructions alone",
        "another execution, bytes alone",
    ]
    others = {"inference": "perfect separate convolutions", "training": "compiled"}
    cells = [
        [f"{mode}, 17 blocks", *map(number, bound[:3]), f"{number(bound.other)} ({others[mode]})"]
        for mode, bound in found.items()
    ]
    return f"{markdown(header, cells)}\n\nCounted from bytes and machine code, not timed: `python -m bench.aot --all`."
