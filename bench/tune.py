"""Measure on this GPU which tiles and which paths are fastest, for the choosers of tiles and for ``backend="auto"``.

    python -m bench.tune [--alpha A] [--resize R] [--variants] [--dtype fp16|bf16] [--minutes M] [--json FILE]

Of each distinct shape, those that move most bytes first: the tiles that a kernel may take, each held to the results of
the rule's tile and then timed in turns with it; and the paths of an operation, by the kernels with the tiles just
found, by torch's operations (cuDNN in channels_last, ``benchmark=True``), and by what torch.compile makes of those. A
tile replaces the rule's only where it wins by more than noise. What no time is left for stays as it is, and is said.

Times are an image's at one batch, which is no key of the tables: tiles and paths must not change with the last, partial
batch of an epoch, and at hundreds of images they have settled. They are written to ``kernels/measured.json`` under the
name of the GPU, beside what was found on others and for other shapes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import common, measured
from kernels.common import Launch
from kernels.warmup import compile_ahead
from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse
from mnv2.model import VARIANTS, LayerShape, layer_shapes
from mnv2.precision import numerics

from . import results, timing
from .blocks import Block
from .figures import check_sizes
from .files import replace_file
from .tune_jobs import Group, Job, PathJob, TileJob, head_group, inference_group
from .tune_training import training_group

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDS = 20
MARGIN = 0.02  # by which a tile's median must be under that of the rule's tile
WINS = 0.75  # share of the rounds that it must win, too
HELD_BACK = 40  # a training block's launches take the host milliseconds
TILE_ROUNDING, PATH_ROUNDING = 4, 64  # roundings by which two tiles and two paths may differ: see ``differ``

Name = TypeVar("Name", bound=Hashable)
Say = Callable[[str], None]


@dataclass(frozen=True)
class TuneConfig:
    """What is measured."""

    alpha: float = option(1.0, "width multiplier")
    resize: int = option(224, "side of the network's input in pixels")
    variants: bool = option(False, "the shapes of all published variants too")
    dtype: str = option("fp16", "type of the activations", choices=tuple(DTYPES))
    batch: int = option(256, "pictures in a batch that is timed")
    minutes: float = option(60.0, "no job is begun after so long")
    json: str = option(str(measured.TABLES), "the tables, read and written again", metavar="FILE")

    def __post_init__(self) -> None:
        check_sizes(self.alpha, resize=self.resize, batch=self.batch)
        if not self.minutes > 0:
            raise InputError(f"minutes: expected a positive number, got {self.minutes:g}")


def winner(seconds: Mapping[Name, Sequence[float]], first: Name) -> Name:
    """Of calls timed in turns the quickest of those that beat ``first`` by more than noise, else ``first``."""
    rule = seconds[first]

    def beats(name: Name) -> bool:
        wins = sum(ours < theirs for ours, theirs in zip(seconds[name], rule, strict=True))
        return median(seconds[name]) < (1 - MARGIN) * median(rule) and wins >= WINS * len(rule)

    return min(filter(beats, seconds), key=lambda name: median(seconds[name]), default=first)


def differ(found: Sequence[Tensor], wanted: Sequence[Tensor], roundings: float, dtype: torch.dtype) -> str | None:
    """What is wrong with results that should be ``wanted`` but for rounding to ``dtype``, or None.

    Their root mean square difference is held to so many roundings of their size: a sum in another order may turn a
    ReLU6's mask here and there, so the largest difference says little.
    """
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        got, want = got.double(), want.double()
        if not got.isfinite().all():
            return f"result {i} isn't finite"
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        if error > roundings * torch.finfo(dtype).eps:
            return f"result {i} differs by {error:.1e} of its size"
    return None


@dataclass
class Tuner:
    """Measures jobs into ``table``, one device's, with a clock and a way to run what is launched.

    ``like`` has the type and device of the jobs. ``compile`` takes launches before the first of them runs, to compile
    them side by side.
    """

    like: Tensor
    batch: int
    clock: timing.Clock
    run: Callable[[Launch], None]
    compile: Callable[[Iterable[Launch]], object]
    say: Say
    table: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"tiles": [], "paths": []})

    def measure(self, job: Job) -> None:
        """Put what is found into the table, in place of what was there; a job that fails is said and left out."""
        try:
            row = self._tile(job) if isinstance(job, TileJob) else self._path(job)
        except Exception as error:
            self.say(f"{job.name}: left as it is, {_told(error)}")
            return
        kind = "tiles" if isinstance(job, TileJob) else "paths"
        keys = ("op", "shape", "dtype")
        others = [old for old in self.table[kind] if any(old.get(key) != row.get(key) for key in keys)]
        self.table[kind] = [*others, row]

    def planted(self, *trial: Mapping[str, Any]) -> AbstractContextManager[None]:
        """What was measured is the table as it is by now, but for a row of tiles that is on trial."""
        table = {**self.table, "tiles": [*self.table["tiles"], *trial]}
        return measured.planted({common.limits(self.like.device).name: table})

    def _tile(self, job: TileJob) -> dict[str, Any]:
        candidates, calls = job.candidates, {}
        rows = [{"op": job.choice.op, "shape": job.shape, "tile": measured.fields_of(tile)} for tile in candidates]
        prepared = []
        for row, tile in zip(rows, candidates, strict=True):
            with self.planted(row):
                prepared.append(job.prepare(tile))
        self.compile(launch for one in prepared for launch in one.launches)
        wanted: tuple[Tensor, ...] = ()
        for i, one in enumerate(prepared):
            for tensor in one.written:
                tensor.fill_(torch.nan)
            try:
                self._launch(one.launches)
                found = tuple(tensor.clone() for tensor in one.results())
            except Exception as error:
                if i == 0:
                    raise
                self.say(f"{job.name}: {_text(candidates[i])} skipped, {_told(error)}")
                continue
            wanted = wanted or found
            if problem := differ(found, wanted, TILE_ROUNDING, self.like.dtype):
                if i == 0:
                    raise RunError(f"the rule's {problem}")
                self.say(f"{job.name}: {_text(candidates[i])} refused, {problem}")
                continue
            calls[i] = partial(self._launch, one.launches)
        seconds = timing.alternate(calls, ROUNDS, self.clock)  # type: ignore[type-var]
        best = winner(seconds, 0)
        us = {i: self._us(seconds[i]) for i in (best, 0)}
        change = "the rule's" if best == 0 else f"{_text(candidates[best])}, {us[best]:g} against {us[0]:g} us an image"
        self.say(f"{job.name}: {change} (of {len(calls)})")
        return {**rows[best], "batch": self.batch, "us_an_image": us[best], "rule_us_an_image": us[0]}

    def _launch(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            self.run(launch)

    def _path(self, job: PathJob) -> dict[str, Any]:
        calls: dict[str, Callable[[], object]] = {}
        wanted: tuple[Tensor, ...] = ()
        torch.compiler.reset()  # a shape that was compiled before must not make this one's sizes symbols
        with self.planted(), numerics(deterministic=False):
            for path, step in job.steps.items():
                try:
                    found = step()
                except Exception as error:
                    self.say(f"{job.name}: {path} skipped, {_told(error)}")
                    continue
                wanted = wanted or found
                if problem := differ(found, wanted, PATH_ROUNDING, self.like.dtype):
                    self.say(f"{job.name}: {path} refused, {problem}")
                    continue
                calls[path] = step
            seconds = timing.alternate(calls, ROUNDS, self.clock)
        us = {path: self._us(times) for path, times in seconds.items()}
        self.say(f"{job.name}: " + ", ".join(f"{path} {time:g}" for path, time in us.items()) + " us an image")
        dtype = str(self.like.dtype).removeprefix("torch.")
        return {"op": job.op, "shape": dict(job.shape), "dtype": dtype, "batch": self.batch, "us_an_image": us}

    def _us(self, seconds: Sequence[float]) -> float:
        return timing.significant(median(seconds) / self.batch * 1e6)


def _told(error: Exception) -> str:
    """An error in a line; a compiler's has many, of which the last says most."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}" + (f": {lines[-1].strip()[:200]}" if lines else "")


def _text(tile: Any) -> str:
    return " ".join(f"{name} {value}" for name, value in measured.fields_of(tile).items() if value not in (None, False))


def tune(groups: Iterable[Group], tuner: Tuner, in_time: Callable[[], bool], save: Callable[[], None]) -> list[str]:
    """Measure ``groups`` in order, as long as there is time, and ``save`` after each; what wasn't got to."""
    left = []
    for group in groups:
        if not in_time():
            left.append(group.name)
            continue
        tuner.say(f"\n{group.name}")
        try:
            for job in group.jobs():
                if in_time():
                    tuner.measure(job)
                else:
                    left.append(job.name)
        except Exception as error:  # as memory that doesn't suffice, or a kernel of the rule's that can't run
            left.append(f"{group.name} ({_told(error)})")
        save()
    return left


def groups_of(layers: Iterable[LayerShape], batch: int, like: Tensor) -> list[Group]:
    """A group for each distinct shape among ``layers``, in training too, that which moves most bytes first."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for layer in layers:
        shape = layer.kind, (layer.c_in, layer.c_mid, layer.c_out, layer.height, layer.stride)
        counts[shape] = counts.get(shape, 0) + 1
    groups = []
    for (kind, sizes), count in counts.items():
        if kind == "head":
            groups.append(head_group(sizes[0], sizes[2], sizes[3], count, batch, like))
        elif kind == "block":
            groups += [make(Block(*sizes), count, batch, like) for make in (inference_group, training_group)]
    return sorted(groups, key=lambda group: -group.value)


def save(path: Path, device: str, table: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the table of ``device`` into the file at ``path``, all of it or nothing; those of other devices stay."""
    tables = {**_read(path), device: {**table, **about}}
    replace_file(path, json.dumps(tables, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return measured.read(path)
    except RuntimeError as error:
        raise InputError(str(error)) from None


def lines_of(table: Mapping[str, Any]) -> Iterator[str]:
    """The table of a device for a reader: tiles that aren't the rule's, and all paths."""
    changed = [row for row in table["tiles"] if row["us_an_image"] != row["rule_us_an_image"]]
    yield f"\ntiles: {len(table['tiles'])} measured, {len(changed)} better than the rule's; us an image"
    for row in changed:
        yield f"{row['us_an_image']:9.3f} for {row['rule_us_an_image']:9.3f}  {row['op']} {_sizes(row['shape'])}"
    yield "\npaths: us an image"
    yield "".join(f"{path:>10}" for path in measured.PATHS) + f"  {'fastest':10}"
    for row in table["paths"]:
        us = row["us_an_image"]
        cells = "".join(f"{us[path]:10.3f}" if path in us else f"{'':10}" for path in measured.PATHS)
        yield f"{cells}  {min(us, key=us.get):10}{row['op']} {_sizes(row['shape'])} {row['dtype']}"


def _sizes(shape: Mapping[str, int]) -> str:
    return " ".join(f"{name} {int(value)}" for name, value in shape.items())


def measure_here(config: TuneConfig, words: Sequence[str]) -> None:
    """All of it on the current GPU."""
    if not torch.cuda.is_available():
        raise RunError("torch sees no CUDA GPU here, and nothing else can be measured")
    device = torch.device("cuda", torch.cuda.current_device())
    if problem := common.unsupported_device(device):
        raise RunError(problem)
    started, path, name = time.monotonic(), Path(config.json), common.limits(device).name
    networks = [(config.alpha, config.resize)]
    if config.variants:
        networks += [(alpha, side) for alpha, sides in VARIANTS.items() for side in sides]
    layers = [layer for network in dict.fromkeys(networks) for layer in layer_shapes(*network)]
    like = torch.empty(0, dtype=DTYPES[config.dtype], device=device)
    before = _read(path).get(name, {"tiles": [], "paths": []})
    tuner = Tuner(
        like,
        config.batch,
        timing.CudaClock(device, HELD_BACK),
        run=lambda launch: launch.run(device),
        compile=partial(compile_ahead, device=device, progress=False, ignore_errors=True),
        say=partial(print, flush=True),
        table={kind: before[kind] for kind in ("tiles", "paths")},
    )
    about = results.surroundings(["python", "-m", "bench.tune", *words], on_gpu=True)
    left = tune(
        groups_of(layers, config.batch, like),
        tuner,
        in_time=lambda: time.monotonic() - started < config.minutes * 60,
        save=lambda: save(path, name, tuner.table, about),
    )
    print("\n".join(lines_of(tuner.table)))
    if left:
        print(f"\nnot measured, and as before: {'; '.join(left)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    config = parse(TuneConfig, words, "Measure on this GPU which tiles and paths are fastest.")
    return exit_status("bench.tune", lambda: measure_here(config, words))


if __name__ == "__main__":
    sys.exit(main())
