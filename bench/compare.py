"""Say what became better or worse between two results: ``python -m bench.compare OLD NEW [--tolerance 0.05]``.

OLD and NEW are files of ``bench/results/`` (``bench/results.py`` says their form), records of ``bench.static`` or
``bench.aot``, or two folders of such files, of which files without rows are left out. A row is compared with the one of
its case and device, or where there is none with the only one of its case on another device. Figures are known by the
units that their names end in: times, bytes, registers, instructions and ratios are costs, rates and shares are gains;
others are left out. Ours of a ratio is a cost too; its spread is taken to be the ratio's.

A change up to the tolerance is no change. Nor is one between medians that both lie where the spreads of their rounds
overlap: it is called noise. Figures of what ours is compared with are shown and not judged. Exits with 1 where
something became worse.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse

from .cases import case_of

GAIN = re.compile(r"(^|_)(per_s(econd)?|[kmgt]b_s|t?flops|share(_of_\w+)?)$")
COST = re.compile(
    r"(^|_)(ns|us|ms|microseconds|milliseconds|seconds|kib|mib|gib|kb|mb|gb|bytes|ratio|registers|spill|shared"
    r"|instructions|launches)(_(an?|per)_\w+)?$"
)
WORSE = "worse"

Key = tuple[str, str, str]  # suite, case, device


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""

    old: str = option(None, "results before: a file or a folder", positional=True, metavar="OLD")
    new: str = option(None, "results after", positional=True, metavar="NEW")
    tolerance: float = option(0.05, "change that is none, as a share of the old figure")

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise InputError(f"tolerance: expected a number from 0 up, got {self.tolerance}")


class Figure(NamedTuple):
    """A number, the smallest and largest of its rounds where they are known, and how it is judged.

    ``sign`` is 1 of a cost, -1 of a gain, 0 of what isn't ours.
    """

    value: float
    sign: int
    spread: tuple[float, float] | None = None


class Entry(NamedTuple):
    """Figures of a case, and what they were found with: device, cores and versions."""

    figures: dict[str, Figure]
    found_with: dict[str, str]


class Change(NamedTuple):
    """A line of the table."""

    case: str
    figure: str
    old: float
    new: float
    share: float
    verdict: str


def load(path: Path) -> dict[Key, Entry]:
    """All rows of a file, or of the files of a folder.

    Raises:
        InputError: there are no results at ``path``.
    """
    if not path.is_dir():
        return _load(path, "")
    files = sorted(path.glob("*.json"))
    if not files:
        raise InputError(f"{path}: expected a folder with results, found no .json in it")
    return {key: entry for file in files for key, entry in _load(file, file.stem, without_rows=True).items()}


def _load(path: Path, suite: str, *, without_rows: bool = False) -> dict[Key, Entry]:
    try:
        document = json.loads(path.read_text())
        if without_rows and "rows" not in document:
            return {}
        found = {}
        for row in document["rows"]:
            case = case_of(row).name if "kernel" in row and "case" not in row else row["case"]
            about = {name: str(row[name]) for name in ("device", "cores") if name in row}
            about |= row.get("versions", document.get("versions", {}))
            found[suite, case, about.get("device", "")] = Entry(figures_of(row), about)
        return found
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file or a folder of results, there is none") from None
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: expected results of benchmarks, got {type(error).__name__}: {error}") from None


def figures_of(row: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures of a row with a unit that is known, and its ratios with what they are of."""
    numbers = {name: value for name, value in row.items() if type(value) in (int, float)}
    units = tuple(name.removeprefix("ours") for name in numbers if name.startswith("ours_"))
    found = {}
    for name, value in numbers.items():
        theirs = name.startswith("copy_") or (name.endswith(units) and not name.startswith("ours_"))
        if sign := -1 if GAIN.search(name) else bool(COST.search(name)):
            found[name] = Figure(value, 0 if theirs else sign)
    for ratio in row.get("ratios", []):
        name, unit, (low, high) = ratio["name"], ratio["unit"], ratio["ratio_min_max"]
        scale = ratio["ours"] / ratio["ratio"]
        found[f"{name}: ratio"] = Figure(ratio["ratio"], 1, (low, high))
        found[f"{name}: ours, {unit}"] = Figure(ratio["ours"], 1, (low * scale, high * scale))
        found[f"{name}: theirs, {unit}"] = Figure(ratio["theirs"], 0)
    return found


def pairs(old: Mapping[Key, Entry], new: Mapping[Key, Entry]) -> dict[Key, Key]:
    """Keys of ``new`` by those of ``old``: of the same device, else of the only other one on both sides."""
    found = {key: key for key in old if key in new}
    left, right = (_by_case(key for key in side if key not in found) for side in (old, new))
    for case, keys in left.items():
        if len(keys) == len(right.get(case, [])) == 1:
            found[keys[0]] = right[case][0]
    return found


def _by_case(keys: Iterable[Key]) -> dict[tuple[str, str], list[Key]]:
    found: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        found.setdefault(key[:2], []).append(key)
    return found


def verdict(old: Figure, new: Figure, tolerance: float) -> tuple[float, str]:
    """Change as a share of the old figure, and what it is called."""
    share = new.value / old.value - 1 if old.value else math.inf
    if not new.sign:
        return share, "theirs"
    if old.spread and new.spread:
        low, high = max(old.spread[0], new.spread[0]), min(old.spread[1], new.spread[1])
        if all(low <= value <= high for value in (old.value, new.value)):
            return share, "noise"
    if abs(share) <= tolerance:
        return share, "same"
    return share, "better" if share * new.sign < 0 else WORSE


def changes(old: Mapping[Key, Entry], new: Mapping[Key, Entry], tolerance: float) -> Iterator[Change]:
    """Each figure that both have and that isn't equal."""
    for before, after in pairs(old, new).items():
        name = ": ".join(filter(None, before[:2]))
        for figure, was in old[before].figures.items():
            now = new[after].figures.get(figure)
            if now is not None and now.value != was.value:
                yield Change(name, figure, was.value, now.value, *verdict(was, now, tolerance))


def unlike(old: Mapping[Key, Entry], new: Mapping[Key, Entry]) -> list[str]:
    """Devices and versions that differ between rows that are compared."""
    found = {}
    for before, after in pairs(old, new).items():
        one, other = old[before].found_with, new[after].found_with
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                found[f"{name} {one.get(name, 'none')} -> {other.get(name, 'none')}"] = None
    return list(found)


def alone(side: Mapping[Key, Entry], matched: Iterable[Key]) -> list[str]:
    """Cases of a side that the other doesn't have."""
    return [", ".join(filter(None, key)) for key in side.keys() - set(matched)]


def table(rows: Sequence[Change]) -> Iterator[str]:
    """The changes in columns."""
    cells = [("case", "figure", "old", "new", "change", "")]
    for row in rows:
        cells.append((row.case, row.figure, f"{row.old:,.12g}", f"{row.new:,.12g}", f"{row.share:+.1%}", row.verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
        yield "  ".join(put(cell, width) for put, cell, width in zip(aligned, line, widths, strict=True)).rstrip()


def report(config: CompareConfig) -> None:
    """Print the comparison; RunError where something became worse."""
    paths = Path(config.old), Path(config.new)
    if paths[0].is_dir() != paths[1].is_dir():
        raise InputError(f"new: expected two files or two folders, got {config.old} and {config.new}")
    old, new = map(load, paths)
    matched = pairs(old, new)
    if not matched:
        raise InputError(f"new: expected cases that {config.old} has, got none in {config.new}")
    if differences := unlike(old, new):
        print(f"not alike: {'; '.join(differences)}\n")
    rows = list(changes(old, new, config.tolerance))
    shared = sum(len(old[a].figures.keys() & new[b].figures.keys()) for a, b in matched.items())
    if rows:
        print(*table(rows), sep="\n")
    print(f"{shared} figures of {len(matched)} cases, {shared - len(rows)} of them equal")
    for path, only in ((config.old, alone(old, matched)), (config.new, alone(new, matched.values()))):
        print(*(f"only in {path}: {case}\n" for case in sorted(only)), sep="", end="")
    if worse := sum(row.verdict == WORSE for row in rows):
        raise RunError(f"figures that became worse by more than {config.tolerance:.3g} of what they were: {worse}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(CompareConfig, argv, "What became better or worse between two results of benchmarks.")
    return exit_status("bench.compare", lambda: report(config))


if __name__ == "__main__":
    sys.exit(main())
