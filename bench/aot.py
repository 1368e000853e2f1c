"""Compile the kernels for GPUs that are not here, and say what their code costs: ``python -m bench.aot --help``.

Each row is one launch as its launcher would make it, on tensors of the meta device. Its bytes, instructions, products
and passes through shared memory, over what one representative device a capability can do, bound the time; nothing is
timed. Grids of the depthwise convolution and of the passes of training are those of an H100's 132 processors on
every capability, and every walk of a loop is counted at full length. Of a pass with a loop in a loop both are
multiplied by their trips; programs that return at once, as no channel is flagged, count as none. Which launches:
``bench/cases.py``.

What blocks at inference are made of on sm_90 is written down beside their tiles too, in ``kernels/tiles.json``; a run
fails where it has changed.
"""

# Torch, Triton and the kernels are imported where they are used: TRITON_INTERPRET is refused before them.
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from bench import sass, tile_record
from bench.cases import (
    BATCH,
    TRAINING,
    Case,
    Work,
    blocks_of_network,
    every,
    sample,
    sizes_of,
    training_of_network,
    work_of,
)
from bench.files import replace_file
from bench.sass import Facts

if TYPE_CHECKING:
    from kernels.common import Launch
    from kernels.roofline import Bounds

RECORD = Path(__file__).resolve().parent / "results" / "aot.json"
SAVE_SECONDS = 10
NOTE = "Bounds from counted bytes and instructions, not timings: no kernel was run."
TILE = ("BLOCK_", "COLUMNS", "WIDE", "TILE_")  # how the compile-time sizes begin that the tile gives
COLUMNS = {  # of the table: how each shows a report
    "kernel": "{kernel}",
    "shape": "{shape}",
    "type": "{dtype}",
    "padding": "{padding}",
    "tile": "{tile}",
    "regs": "{registers}",
    "spill": "{spill}/{declared_spill}",
    "shared": "{shared}",
    "occ": "{occupancy:.0%}",
    "tensor": "{tensor_core}",
    "ins/el": "{instructions_an_element:.1f}",
    "HBM us": "{hbm_us:.3f}",
    "issue us": "{issue_us:.3f}",
    "tensor us": "{tensor_us:.3f}",
    "shared us": "{shared_us:.3f}",
    "binds": "{binds}",
}


def compile_case(case: Case) -> Facts:
    """Facts of the case's compiled kernel."""
    return sass.compile_launch(work_of(case).launch, case.cap)


def _start_worker(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers


def _interrupt_once(signum: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave workers and their folder behind
    raise KeyboardInterrupt


def compile_all(jobs: Mapping[str, Case]) -> Generator[tuple[str, Facts], None, None]:
    """Compile afresh, in a process for each core, and yield (key, facts) as they come."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    workers = max(1, min(os.cpu_count() or 1, len(jobs)))
    before = signal.signal(signal.SIGINT, _interrupt_once)
    try:
        with tempfile.TemporaryDirectory(prefix="aot-") as folder:
            with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(folder,)) as pool:
                futures = {pool.submit(compile_case, case): name for name, case in jobs.items()}
                try:
                    for future in as_completed(futures):
                        yield futures[future], future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
    finally:
        signal.signal(signal.SIGINT, before)


class Row(NamedTuple):
    """A case with what it launches and the key of its code; cases of one key share their compiled kernel."""

    case: Case
    work: Work
    key: str


def plan(cases: Iterable[Case]) -> list[Row]:
    rows = []
    for case in dict.fromkeys(cases):
        work = work_of(case)
        rows.append(Row(case, work, sass.key(work.launch, case.cap)))
    return rows


def bounds(row: Row, facts: Facts) -> Bounds:
    """Bounds of the row's launch, in seconds."""
    programs = math.prod(row.work.launch.grid)
    return sass.bounds(row.case.cap, row.work.run_through(facts), programs, 1, row.work.touched)


def blocks_bounds(rows: Iterable[Row], compiled: Mapping[str, Facts]) -> dict[int, dict[str, float]]:
    """Bounds of the 17 blocks of alpha 1.0 at 224, where ``rows`` have them all: by capability, microseconds an image.

    ``ours`` is the sum of the largest bounds of the launches, ``separate`` the bytes of three perfect convolutions a
    block over the device's bandwidth.
    """
    from bench.executions import epilogue, rows_of, totals
    from kernels import roofline
    from mnv2.model import layer_shapes

    there = {row.case: row for row in rows if "error" not in compiled.get(row.key, {"error": ""})}
    found = {}
    for cap in sorted({case.cap for case in there if case.kernel == "block"}):
        blocks = blocks_of_network(cap)
        if not set(blocks) <= there.keys():
            continue
        ours = math.fsum(max(bounds(there[case], compiled[there[case].key])) for case in blocks)
        separate = totals(rows_of(epilogue, layer_shapes(1.0, 224), BATCH, False), BATCH)["blocks"] * 1e6
        seconds = {"ours": ours / BATCH, "separate": separate / roofline.DEVICES[cap].bandwidth}
        found[cap] = {name: round(value * 1e6, 3) for name, value in seconds.items()}
    return found


def training_bounds(rows: Iterable[Row], compiled: Mapping[str, Facts]) -> dict[int, dict[str, float]]:
    """Bounds of the 17 blocks of alpha 1.0 at 224 in training, finalisers included, as ``blocks_bounds``.

    ``issue`` and ``hbm`` are the sums of those bounds and ``ours`` that of each launch's largest; ``compiled`` is the
    traffic of the blocks as torch.compile would run them, over the device's bandwidth.
    """
    from bench.executions import compiled as by_inductor
    from bench.executions import rows_of, totals
    from kernels import roofline
    from mnv2.model import layer_shapes

    there = {row.case: row for row in rows if "error" not in compiled.get(row.key, {"error": ""})}
    found = {}
    for cap in sorted({case.cap for case in there if case.kernel == "B2"}):
        passes = training_of_network(cap)
        if not set(passes) <= there.keys():
            continue
        limits = [bounds(there[case], compiled[there[case].key]) for case in passes]
        traffic = totals(rows_of(by_inductor, layer_shapes(1.0, 224), BATCH, True), BATCH)["blocks"] * 1e6
        seconds = {
            "issue": math.fsum(limit.issue for limit in limits) / BATCH,
            "hbm": math.fsum(limit.hbm for limit in limits) / BATCH,
            "ours": math.fsum(map(max, limits)) / BATCH,
            "compiled": traffic / roofline.DEVICES[cap].bandwidth,
        }
        found[cap] = {name: round(value * 1e6, 3) for name, value in seconds.items()}
    return found


def report(row: Row, facts: Facts) -> Facts:
    """The row as the table and the record have it: facts, occupancy and bounds; times in microseconds an image."""
    case, work = row.case, row.work
    programs = math.prod(work.launch.grid)
    if case.kernel in TRAINING:
        a_warp = work.run_through(facts)["instructions"]
    else:
        a_warp = facts["loop"] * work.compiled_trips(facts) or facts["instructions"]
    issued = programs * facts["warps"] * a_warp
    limits = bounds(row, facts)
    blocks = {name: size for name, size in sizes_of(work.launch).items() if name.startswith(TILE) and size}
    return {
        **{name: value for name, value in dataclasses.asdict(case).items() if name != "side"},
        "shape": case.shape,
        "height": case.side,
        "width": case.side,
        "tile": {"num_warps": work.launch.num_warps, **blocks},
        "programs": programs,
        "trips": work.trips if work.walks else work.compiled_trips(facts),
        "registers": facts["registers"],
        "spill": facts["spill"],
        "declared_spill": work.launch.spill_bytes,
        "shared": facts["shared"],
        "occupancy": round(sass.occupancy(case.cap, facts["registers"], facts["shared"], facts["warps"]), 4),
        "tensor_core": facts["tensor_core"],
        "instructions_an_element": round(32 * issued / work.elements, 2),
        **{f"{name}_us": round(seconds / BATCH * 1e6, 4) for name, seconds in limits._asdict().items()},
        "binds": limits.binds,
        "key": row.key,
    }


def failures(rows: Iterable[Row], compiled: Mapping[str, Facts]) -> list[str]:
    """What is wrong with each row that would not run as declared, by its name."""
    found = []
    for row in rows:
        launch = row.work.launch
        problems = sass.problems(row.case.cap, compiled[row.key], launch.spill_bytes, launch.grid)
        found += [f"{row.case.name}: {problem}" for problem in problems]
    return found


def products(launch: Launch) -> int:
    """Products of matrices that a block's kernel unrolls, by which its compilation takes long; 0 for other kernels."""
    at = launch.arguments
    if walk := at.get("walk"):  # about as many as columns, rows and pieces of what it multiplies
        pieces = -(-walk.c_in // walk.BLOCK_K) + -(-walk.c_out // max(walk.BLOCK_O, 1))
        return walk.own * walk.stride * walk.UNROLL * pieces
    if "TILE_H" not in at:
        return 0
    halo = math.prod((at[tile] - 1) * at["STRIDE"] + 3 for tile in ("TILE_H", "TILE_W"))
    return halo * -(-at["C_IN"] // at["BLOCK_K"]) + at["TILE_H"] * at["TILE_W"] * -(
        -(at["C_OUT"] or 0) // at["BLOCK_O"]
    )


def gather(
    rows: Sequence[Row],
    compiled: dict[str, Facts],
    save: Callable[[], None],
    compile_jobs: Callable[[Mapping[str, Case]], Generator[tuple[str, Facts], None, None]],
) -> None:
    """Put the facts of each row's key into ``compiled``, compiling once what is missing, and ``save`` now and then."""
    longest_first = sorted(rows, key=lambda row: products(row.work.launch), reverse=True)  # so that all end together
    jobs = {row.key: row.case for row in longest_first if row.key not in compiled}
    saved = time.monotonic()
    try:
        with contextlib.closing(compile_jobs(jobs)) as stream:
            for name, facts in tqdm(stream, "compiling", len(jobs), leave=False, disable=None):
                compiled[name] = facts
                if time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
    finally:
        save()


def read_record(path: Path) -> dict[str, Facts]:
    """Facts by key of an earlier record, or none where there is no file."""
    try:
        compiled = dict(json.loads(path.read_text())["compiled"])
        for facts in compiled.values():
            facts["registers"], facts["spill"], facts["warps"]
        return compiled
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a record of bench.aot, got {type(error).__name__}: {error}") from error


def write_record(path: Path, command: str, rows: Iterable[Row], compiled: Mapping[str, Facts]) -> None:
    """Replace the record whole: a line a kernel and a row. What did not compile is left out, to be tried again."""
    good = {name: facts for name, facts in sorted(compiled.items()) if "error" not in facts}
    rows = list(rows)
    head = {"command": command, "note": NOTE, "versions": {name: version(name) for name in ("torch", "triton")}}
    head["blocks_bound_us"] = blocks_bounds(rows, compiled)
    head["training_bound_us"] = training_bounds(rows, compiled)
    kernels = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in good.items())
    lines = ",\n".join(
        json.dumps(report(row, good[row.key])) for row in sorted(rows, key=lambda row: row.case) if row.key in good
    )
    text = f'{json.dumps(head)[:-1]},\n"compiled": {{\n{kernels}\n}},\n"rows": [\n{lines}\n]}}\n'
    replace_file(path, text)


def table(reports: Sequence[Facts]) -> str:
    """The reports in columns, grouped by capability."""
    from kernels import roofline

    lines = [
        NOTE,
        f"us: microseconds an image at batch {BATCH}; ins/el: instructions of the loop (training: all) an element",
    ]
    for cap, device in roofline.DEVICES.items():
        here = [{**report, "tile": _tile(report["tile"])} for report in reports if report["cap"] == cap]
        if not here:
            continue
        lines.append(f"\nsm_{cap}, bounds for {device.name}")
        cells = [list(COLUMNS), *([form.format_map(report) for form in COLUMNS.values()] for report in here)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)


def _tile(tile: Mapping[str, int]) -> str:
    warps, *blocks = tile.items()
    return " ".join([f"{warps[1]}w", *(f"{name.removeprefix('BLOCK_')}{size}" for name, size in blocks)])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=" ".join(__doc__.split("\n\n")[:2]))
    known = ",".join(map(str, sass.CAPABILITIES))
    parser.add_argument("--cap", default=known, help="capabilities, by default %(default)s")
    parser.add_argument("--all", action="store_true", help=f"every shape of the variants, kept in {RECORD.name}; long")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    args = parser.parse_args(argv)
    if not set(args.cap.split(",")) <= set(known.split(",")):
        parser.error(f"--cap: expected some of {known}, got {args.cap!r}")
    args.cap = sorted({int(cap) for cap in args.cap.split(",")})
    if args.json is None and args.all:
        args.json = RECORD
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: expected a file in a folder that exists, got {str(args.json)!r}")
    return args


def run(args: argparse.Namespace, command: str) -> int:
    """Compile what ``args`` ask for, record it and print it; the exit status."""
    from kernels import roofline, tiles

    started = time.monotonic()
    wanted = plan(every(sass.CAPABILITIES) if args.all else sample(args.cap))
    rows = [row for row in wanted if row.case.cap in args.cap and args.only in row.case.name]
    if not rows:
        raise ValueError(f"--only: expected a part of a row's name, got {args.only!r}")
    compiled = read_record(args.json) if args.all else {}
    keys = {row.key for row in rows}
    missing = len(keys - compiled.keys())

    def save() -> None:
        if args.json is not None:
            write_record(args.json, command, wanted if args.all else rows, compiled)

    try:
        gather(rows, compiled, save, compile_all)
    except KeyboardInterrupt:
        kept = f", kept in {args.json}" if args.json else ""
        raise KeyboardInterrupt(f"{len(keys & compiled.keys())} of {len(keys)} kernels compiled{kept}") from None
    if args.all:
        for stale in compiled.keys() - {row.key for row in wanted}:
            del compiled[stale]
        save()
        tile_record.write(tiles.RECORD, command, wanted, compiled)
    print(table([report(row, compiled[row.key]) for row in rows if "error" not in compiled[row.key]]), end="\n\n")
    notes = {
        row.case.name: sass.remarks(compiled[row.key], known=row.work.macs > 0, nested=row.work.walks > 0)
        for row in rows
    }
    print(*(f"{name}: {note}\n" for name, found in notes.items() for note in found), sep="", end="")
    for cap, bound in blocks_bounds(rows, compiled).items():
        print(
            f"sm_{cap}: 17 blocks of alpha 1.0 at 224 take at least {bound['ours']:.2f} us an image on "
            f"{roofline.DEVICES[cap].name}, {bound['separate']:.2f} as perfect separate convolutions by bytes alone"
        )
    for cap, bound in training_bounds(rows, compiled).items():
        print(
            f"sm_{cap}: training: 17 blocks take at least {bound['issue']:.2f} us an image by issue, "
            f"{bound['hbm']:.2f} by HBM, {bound['ours']:.2f} by each launch's largest bound, beside "
            f"{bound['compiled']:.2f} of compiled execution's traffic"
        )
    wrong = failures(rows, compiled) + tile_record.changes(tiles.RECORD, rows, compiled)
    spilling = sum(compiled[row.key].get("spill", 0) > 0 for row in rows)
    print(
        f"{len(rows)} rows, of which {spilling} spill and {len({line.split(':')[0] for line in wrong})} fail; ", end=""
    )
    print(f"{missing} kernels compiled, {len(keys) - missing} reused; {time.monotonic() - started:.0f} s", flush=True)
    print(*(f"{line}\n" for line in wrong), sep="", end="", file=sys.stderr)
    return int(bool(wrong))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a row fails, 2 where there is nothing to report, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if "TRITON_INTERPRET" in os.environ:
        print("TRITON_INTERPRET: unset it, the interpreter's kernels can't be compiled", file=sys.stderr)
        return 2
    try:
        return run(args, shlex.join(["python", "-m", "bench.aot", *argv]))
    except (OSError, ValueError, BrokenProcessPool) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if interrupt.args else "interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
