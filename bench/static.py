"""Hold what is counted without a GPU to the numbers on record; a figure that has grown by more than 2% fails.

    python -m bench.static             compares, and exits with 1 where something has grown or is not on record
    python -m bench.static --record    writes bytes and saved bytes to bench/results/static.json

bytes      of alpha 1.0 at 224, batch 256, at inference and in training: the totals of the network and of its blocks,
           each pass in all blocks, each launch of each block, the number of a block's launches; the totals of every
           other variant. ``bytes`` move through device memory, ``requested_bytes`` are what the programs of our kernels
           load and store (``bench.traffic``).
saved      bytes an image that alpha 1.0 at 224 keeps for its backward with each of ours (``bench.memory``)
kernels    registers, spills, shared memory and instructions of every launch in ``bench/results/aot.json``, which
           ``python -m bench.aot --all`` writes; of a whole launch the instructions are ``issue_us``. Code is known by
           its key: what has one on record is not compiled again. What has none is compiled where it is in the default
           run of ``bench.aot``, and compared with its case on record.

The record is the one in the working tree: what must grow is recorded anew, and committed with the change.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse
from mnv2.logs import versions
from mnv2.model import VARIANTS, layer_shapes

from . import aot, executions, memory, sass
from .cases import BATCH, case_of, every, sample
from .figures import run_interpreted
from .files import replace_file
from .results import RESULTS

RECORD = RESULTS / "static.json"
RECORDING = {"bytes": "python -m bench.static --record", "kernels": "python -m bench.aot --all"}
WHOLE = (1.0, 224)  # the variant that is counted launch by launch
PERCENT = 2  # that a figure may grow by
KERNEL = ("registers", "spill", "shared", "instructions_an_element", "issue_us")
STEPS = {"instructions_an_element": 0.01, "issue_us": 0.0001}  # of figures that the record rounds

Figures = dict[str, dict[str, Any]]  # by case and name


@dataclass(frozen=True)
class StaticConfig:
    """What is done with what is counted."""

    record: bool = option(False, f"write bytes and saved bytes to {RECORD.name} in place of comparing")


class Verdict(NamedTuple):
    """A line for each figure: what fails, and what is only worth a word."""

    failures: list[str]
    notes: list[str]


def charge(figures: Figures, case: str, row: executions.Row) -> None:
    """Add the bytes of ``row`` to those of ``case``."""
    found = figures.setdefault(case, {"bytes": 0})
    found["bytes"] += row.read + row.written
    if row.requested is not None:
        found["requested_bytes"] = found.get("requested_bytes", 0) + row.requested


def rows_of(mode: str, alpha: float, resize: int) -> list[executions.Row]:
    """Our launches, and torch's around them, at a batch."""
    return executions.rows_of(executions.ours, layer_shapes(alpha, resize), BATCH, mode == "training")


def totals(mode: str, alpha: float, resize: int) -> Figures:
    """Bytes of a variant's network and of its blocks."""
    found: Figures = {}
    for row in rows_of(mode, alpha, resize):
        for scope in ("network", "blocks") if row.kind == "block" else ("network",):
            charge(found, f"{mode}, alpha {alpha} at {resize}: {scope}", row)
    return found


def launches(mode: str) -> Figures:
    """Bytes of each pass in all blocks and of each launch, and launches of each block."""
    passes, each, rows = {}, {}, rows_of(mode, *WHOLE)
    for row in rows:
        if row.kind == "block":
            charge(passes, f"{mode}: all {row.op}", row)
        charge(each, f"{mode}: {row.block} {row.op}", row)
    launched = Counter(row.block for row in rows if row.by == "triton")
    return {**passes, **each, **{f"{mode}: {block}": {"launches": number} for block, number in launched.items()}}


def byte_figures() -> Figures:
    """Bytes by the formulas beside the launchers, those of the whole of alpha 1.0 at 224 first."""
    modes = ("inference", "training")
    others = [(alpha, resize) for alpha, sides in VARIANTS.items() for resize in sides if (alpha, resize) != WHOLE]
    parts = [totals(mode, *WHOLE) for mode in modes] + [launches(mode) for mode in modes]
    parts += [totals(mode, *variant) for mode in modes for variant in others]
    return {case: found for part in parts for case, found in part.items()}


def saved_figures() -> Figures:
    """Bytes an image that is saved for the backward, with D and with X alone."""
    alpha, resize = WHOLE
    with tempfile.TemporaryDirectory(prefix="static-") as folder:
        file = Path(folder) / "memory.json"
        words = ["--alpha", str(alpha), "--resize", str(resize), "--json", str(file)]
        if run_interpreted("bench.memory", words, quiet=True):
            raise RunError("bench.memory has failed, see above")
        found = json.loads(file.read_text())
    return {
        f"training with {mode}: {scope}": {"saved_bytes": round(found[f"{scope}_saved_mib_{mode}"] * memory.MIB)}
        for mode in ("D", "X")
        for scope in ("blocks", "network")
    }


def read(path: Path) -> Figures:
    """Bytes on record.

    Raises:
        InputError: there is no such file, or it isn't a record.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return numbers({row["case"]: {name: row[name] for name in row if name != "case"} for row in rows})
    except FileNotFoundError:
        raise InputError(f"{path}: expected a record, there is none: `{RECORDING['bytes']}`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected a record of bench.static, got {type(error).__name__}: {error}") from None


def numbers(figures: Figures) -> Figures:
    """``figures``; TypeError where one is no number."""
    for value in (value for found in figures.values() for value in found.values()):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{value!r} is no number")
    return figures


def write(path: Path, figures: Figures) -> None:
    """Replace the record: a line a case, in the order in which they are counted."""
    head = json.dumps({"command": RECORDING["bytes"], "versions": versions()})[:-1]
    lines = ",\n".join(json.dumps({"case": case, **found}) for case, found in figures.items())
    replace_file(path, f'{head},\n"rows": [\n{lines}\n]}}\n')


def read_kernels(path: Path) -> tuple[dict[str, sass.Facts], Figures]:
    """Facts of compiled kernels by key, and the figures of each launch on record.

    Raises:
        InputError: there is no such file, or it isn't a record.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        figures = {case_of(row).name: {name: row[name] for name in KERNEL} for row in rows}
        return aot.read_record(path), numbers(figures)
    except FileNotFoundError:
        raise InputError(f"{path}: expected a record, there is none: `{RECORDING['kernels']}`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: expected a record of bench.aot, got {type(error).__name__}: {error}") from None


def compare(recorded: Figures, now: Figures, command: str) -> Verdict:
    """What has grown beyond the limit, or from nothing, or isn't on record; fallen figures are notes."""
    failures, notes = [], []
    for case, figures in now.items():
        if case not in recorded:
            failures.append(f"{case}: not on record: `{command}`")
            continue
        for name, new in figures.items():
            if name not in recorded[case]:
                failures.append(f"{case} {name}: not on record: `{command}`")
                continue
            old, step = recorded[case][name], STEPS.get(name, 0)
            growth = f"{new / old - 1:+.1%}" if old else "from nothing"
            line = f"{case} {name}: {old:,.12g} on record, {new:,.12g} now, {growth}"
            if 100 * (new - step) > (100 + PERCENT) * old:
                failures.append(line)
            elif 100 * (new + step) < (100 - PERCENT) * old:
                notes.append(f"{line}: less, record it: `{command}`")
    if gone := [case for case in recorded if case not in now]:
        notes.append(f"{len(gone)} on record are no more, record it: `{command}`: {'; '.join(gone)}")
    return Verdict(failures, notes)


def compare_bytes() -> Verdict:
    """Bytes and saved bytes beside their record."""
    recorded = read(RECORD)
    return compare(recorded, {**byte_figures(), **saved_figures()}, RECORDING["bytes"])


def compare_kernels() -> Verdict:
    """Every launch on record beside what it is now; code that isn't on record is compiled where the sample has it."""
    if "TRITON_INTERPRET" in os.environ:
        raise InputError("TRITON_INTERPRET: unset it, the interpreter's kernels can't be compiled")
    compiled, recorded = read_kernels(aot.RECORD)
    rows, sampled = aot.plan(every(sass.CAPABILITIES)), set(sample(sass.CAPABILITIES))
    changed = [row for row in rows if row.key not in compiled]
    try:
        aot.gather([row for row in changed if row.case in sampled], compiled, lambda: None, aot.compile_all)
    except BrokenProcessPool as error:
        raise RunError(str(error)) from None

    known = [row for row in rows if row.key in compiled]
    broken = {row.case.name: compiled[row.key]["error"] for row in known if "error" in compiled[row.key]}
    now = _figures((row for row in known if row.case.name not in broken), compiled)
    unseen = {row.case.name for row in rows} - now.keys() - broken.keys()
    now |= {case: {} for case in sorted(unseen - recorded.keys())}  # not on record, whatever it is made of
    there = {case: recorded[case] for case in recorded if case not in unseen | broken.keys()}
    failures, notes = compare(there, now, RECORDING["kernels"])
    failures = [f"{case}: does not compile: {error}" for case, error in broken.items()] + failures
    if others := len(unseen & recorded.keys()):
        notes.append(f"{others} other launches have changed and were not compiled: `{RECORDING['kernels']}`")
    return Verdict(failures, notes)


def _figures(rows: Iterable[aot.Row], compiled: Mapping[str, sass.Facts]) -> Figures:
    found = {}
    for row in rows:
        report = aot.report(row, compiled[row.key])
        found[row.case.name] = {name: report[name] for name in KERNEL}
    return found


def check() -> None:
    """Print a line for each figure that isn't as on record; RunError where one fails."""
    failed = 0
    for name, part in (("bytes", compare_bytes), ("kernels", compare_kernels)):
        started = time.monotonic()
        failures, notes = part()
        print(f"{name}: {len(failures)} fail, {len(notes)} notes; {time.monotonic() - started:.1f} s")
        print(*(f"  fails: {line}\n" for line in failures), *(f"  note: {line}\n" for line in notes), sep="", end="")
        sys.stdout.flush()
        failed += len(failures)
    if failed:
        commands = " and ".join(f"`{command}`" for command in RECORDING.values())
        raise RunError(
            f"figures that have grown by more than {PERCENT}% or are not on record: {failed}; "
            f"what must be so is recorded by {commands}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(StaticConfig, argv, "Counted figures beside those on record.")

    def action() -> None:
        if config.record:
            write(RECORD, {**byte_figures(), **saved_figures()})
        else:
            check()

    return exit_status("bench.static", action)


if __name__ == "__main__":
    sys.exit(main())
