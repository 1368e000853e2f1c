"""What ``bench.tune`` decides by a clock that is made up, and that every tile that it may choose is right."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from numerics import GuardedMemory
from toys import GPU, table, toy_row, toy_tile

from bench import tune
from bench.blocks import Block
from bench.tune_jobs import Group, PathJob, Prepared, TileJob, head_group, inference_group
from bench.tune_training import training_group
from kernels import common, measured, tiles, training_tiles
from kernels.common import Limits

interpreted = pytest.mark.skipif(not common.INTERPRETED, reason="runs kernels in Triton's interpreter, on CPU tensors")


class Bench:
    """Runs toy launches, whose results and seconds are as they are said to be."""

    def __init__(self, seconds, broken=(), wrong=(), unwritten=()):
        self.lines, self.out, self.last = [], torch.zeros(4), 0
        self.seconds, self.broken, self.wrong, self.unwritten = seconds, broken, wrong, unwritten
        self.tuner = tune.Tuner(
            torch.empty(0, dtype=torch.float16),
            batch=10,
            clock=self.clock,
            run=self.run,
            compile=lambda launches: list(launches),
            say=self.lines.append,
        )

    def clock(self, call):
        call()
        times = self.seconds[self.last]
        return times.pop(0) if isinstance(times, list) else times

    def run(self, launch):
        self.last = launch.block
        if launch.block in self.broken:
            raise RuntimeError("first line\nout of resource: shared memory\n")
        if launch.block not in self.unwritten:
            self.out.fill_(5.0 if launch.block in self.wrong else 1.0)

    def prepare(self, tile):
        block = toy_tile(7, 2, common.limits(torch.device("cpu"))).BLOCK  # the tile is planted, so a launcher takes it
        assert block == tile.BLOCK
        return Prepared((SimpleNamespace(block=block),), (self.out,), lambda: (self.out,))

    def measure(self):
        self.tuner.measure(TileJob(toy_tile, (7, 2, GPU), self.prepare))
        return self.tuner.table["tiles"]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 10e-6, 2: 9.0e-6, 3: 9.5e-6}, 2),
        ({1: 10e-6, 2: 9.9e-6, 3: 11e-6}, 1),  # one percent is noise
        ({1: 10e-6, 2: [9e-6] * 14 + [11e-6] * 6, 3: 11e-6}, 1),  # so is what loses more than a quarter of the rounds
        ({1: 10e-6, 2: [9e-6] * 15 + [11e-6] * 5, 3: 11e-6}, 2),
    ],
    ids=["the quickest", "within a margin", "in too few rounds", "in enough rounds"],
)
def test_a_tile_replaces_the_rules_where_it_wins_by_more_than_noise(seconds, best):
    (row,) = Bench(seconds).measure()
    assert row["op"] == "toy"
    assert row["shape"] == {"size": 7, "element_size": 2}
    assert row["tile"] == {"BLOCK": best}
    assert row["rule_us_an_image"] == 1.0
    assert row["us_an_image"] == pytest.approx({1: 1.0, 2: 0.9}[best])
    assert "batch" not in row["shape"]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"broken": [2]}, "BLOCK 2 skipped, RuntimeError: out of resource: shared memory"),
        ({"wrong": [2]}, "BLOCK 2 refused, result 0 differs by 4.0e+00 of its size"),
        ({"unwritten": [2]}, "BLOCK 2 refused, result 0 isn't finite"),
    ],
    ids=["fails", "is wrong", "writes nothing"],
)
def test_a_tile_that_cant_be_taken_is_left_out_however_quick_it_is(how, line):
    bench = Bench({1: 10e-6, 2: 1e-6, 3: 9e-6}, **how)
    (row,) = bench.measure()
    assert row["tile"] == {"BLOCK": 3}
    assert any(line in said for said in bench.lines)


def test_where_the_rules_tile_fails_nothing_is_found():
    for how, why in (({"broken": [1]}, "shared memory"), ({"unwritten": [1]}, "the rule's result 0 isn't finite")):
        bench = Bench({1: 1e-6, 2: 1e-6, 3: 1e-6}, **how)
        assert bench.measure() == []
        assert bench.lines == [line for line in bench.lines if "left as it is" in line and why in line]


def test_what_is_measured_again_replaces_what_was():
    bench = Bench({1: 10e-6, 2: 9e-6, 3: 11e-6})
    bench.tuner.table["tiles"] = [toy_row(7, 3), toy_row(8, 3)]
    rows = bench.measure()
    assert [(row["shape"]["size"], row["tile"]["BLOCK"]) for row in rows] == [(8, 3), (7, 2)]


def path_job(**steps):
    return PathJob("head", {"c_in": 8}, steps)


def test_paths_are_timed_in_turns_and_one_that_fails_or_differs_is_left_out():
    bench = Bench({1: 10e-6, 2: 20e-6, 3: 30e-6})

    def step(number, value=1.0):
        bench.last = number
        return (torch.full((4,), value),)

    def fails():
        raise RuntimeError("no path")

    job = path_job(kernels=lambda: step(1), torch=lambda: step(2), compiled=lambda: step(3, 2.0))
    bench.tuner.measure(job)
    (row,) = bench.tuner.table["paths"]
    assert row["us_an_image"] == {"kernels": 1.0, "torch": 2.0}
    assert row["dtype"] == "float16"
    assert any("compiled refused" in line for line in bench.lines)
    bench.tuner.measure(path_job(kernels=lambda: step(1), torch=fails, compiled=lambda: step(3)))
    (row,) = bench.tuner.table["paths"]
    assert row["us_an_image"] == {"kernels": 1.0, "compiled": 3.0}


def test_what_there_is_no_time_for_is_said():
    bench, saves, jobs = Bench({}), [], [path_job(kernels=lambda: (torch.ones(1),)) for _ in range(2)]
    bench.tuner.clock = lambda call: 1e-6
    answers = iter([True, True, False, False])
    groups = [Group("first", 9, lambda: iter(jobs)), Group("second", 1, lambda: iter(jobs))]
    left = tune.tune(groups, bench.tuner, lambda: next(answers), lambda: saves.append(len(bench.tuner.table["paths"])))
    assert left == ["head: c_in 8", "second"]
    assert saves == [1]


def test_a_group_whose_tensors_dont_fit_leaves_the_others_alone():
    def jobs():
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    bench, saves = Bench({}), []
    left = tune.tune([Group("large", 1, jobs)], bench.tuner, lambda: True, lambda: saves.append(1))
    assert left == ["large (OutOfMemoryError: CUDA out of memory)"]
    assert saves == [1]


def test_what_moves_most_bytes_comes_first_and_each_shape_once():
    layers = tune.layer_shapes(0.35, 96)
    groups = tune.groups_of(layers, 256, torch.empty(0, dtype=torch.float16))
    values = [group.value for group in groups]
    assert values == sorted(values, reverse=True)
    assert len({group.name for group in groups}) == len(groups)
    blocks = {(x.c_in, x.c_mid, x.c_out, x.height, x.stride) for x in layers if x.kind == "block"}
    assert len(groups) == 2 * len(blocks) + 1


def test_tables_of_other_devices_stay_and_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "measured.json"
    tune.save(path, "GPU 100", table([toy_row(7, 2)]), {"commit": "a"})
    tune.save(path, "GPU 200", table([toy_row(7, 3)]), {"commit": "b"})
    tune.save(path, "GPU 100", table([toy_row(8, 2)]), {"commit": "c"})
    found = json.loads(path.read_text())
    assert {name: (one["tiles"][0]["shape"]["size"], one["commit"]) for name, one in found.items()} == {
        "GPU 100": (8, "c"),
        "GPU 200": (7, "b"),
    }
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tune.save(path, "GPU 100", table(), {})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["measured.json"]


def test_a_file_of_something_else_is_not_written_over(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text("[1]")
    with pytest.raises(tune.InputError, match=r"measured\.json: expected what `python -m bench\.tune` writes"):
        tune.save(path, "GPU 100", table(), {})
    assert path.read_text() == "[1]"


EVERY_CHOICE = {
    choice.op
    for module in (tiles, training_tiles)
    for choice in vars(module).values()
    if isinstance(choice, measured.Choice)
}
WALKED = {"depthwise", "P2", "P3", "B1", "B2"}
CASES = {  # a group of jobs, and whose tiles it has
    "inference": (inference_group, (Block(8, 16, 8, 5, 1), 1, 1), {"block"}),
    "inference, B is stored": (inference_group, (Block(40, 96, 72, 6, 2), 1, 1), {"block", "project"}),
    "inference, no expansion": (inference_group, (Block(8, 8, 16, 5, 1), 1, 2), {"block"}),
    "head": (head_group, (24, 40, 3, 1, 2), {"head"}),
    "training": (training_group, (Block(8, 16, 8, 4, 1), 1, 1), {*WALKED, "B3"}),
    "training, dZ1 is stored": (training_group, (Block(40, 72, 40, 6, 1), 1, 2), {*WALKED, "B3", "S"}),
    "training, stride 2": (training_group, (Block(16, 96, 24, 12, 2), 1, 2), {*WALKED, "B3"}),
    "training, no expansion": (training_group, (Block(16, 16, 16, 6, 1), 1, 2), {*WALKED, "B3"}),
}
QUICK = ("inference", "head", "training")


def test_the_cases_have_every_choice():
    assert set().union(*(ops for _, _, ops in CASES.values())) == EVERY_CHOICE


def prepare_and_keep(job, sizes, tile):
    """``job.prepare``, and what of its launches isn't a tensor, as text."""
    prepared = job.prepare(tile)
    launches = [launch._replace(arguments=without_tensors(launch.arguments)) for launch in prepared.launches]
    sizes.add(str(launches))
    return prepared


def without_tensors(arguments):
    return {name: value for name, value in arguments.items() if not isinstance(value, torch.Tensor)}


@interpreted
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n not in QUICK)) for n in CASES])
def test_each_candidate_gives_the_results_of_the_rules_tile(name, monkeypatch):
    monkeypatch.setattr(common, "_limits", lambda device: Limits(1, 232448))  # fewer programs, which take time
    memory = GuardedMemory(monkeypatch.setattr)
    make, arguments, ops = CASES[name]
    like, lines = torch.empty(0, dtype=torch.float16), []
    tuner = tune.Tuner(
        like, arguments[-1], lambda call: 1.0, lambda launch: launch.run(like.device), list, lines.append
    )
    jobs = [job for job in make(*arguments, like).jobs() if isinstance(job, TileJob)]
    assert {job.choice.op for job in jobs} == ops
    for job in jobs:
        assert len(job.candidates) > 2
        sizes: set[str] = set()
        tuner.measure(replace(job, prepare=functools.partial(prepare_and_keep, job, sizes)))
        assert len(sizes) == len(job.candidates)  # a launcher takes the tile that is planted
    assert [line.split(": ")[-1] for line in lines] == [f"the rule's (of {len(job.candidates)})" for job in jobs]
    memory.buffers = [buffer for buffer in memory.buffers if not buffer.is_meta]  # those that were only planned for
    memory.check()


BLOCK_SIZES = {"c_in": 8, "c_mid": 16, "c_out": 8, "H": 4, "W": 4, "stride": 1}
PATHS = {  # each operation, and the sizes by which "auto" looks it up
    "head": {"c_in": 8, "c_out": 16, "H": 2, "W": 2},
    "inference block": BLOCK_SIZES,
    "training block": BLOCK_SIZES,
    "depthwise": {"C": 16, "H": 4, "W": 4, "stride": 1},
    "depthwise training": {"C": 16, "H": 4, "W": 4, "stride": 1},
}


@interpreted
def test_the_paths_of_each_operation_agree(monkeypatch):
    monkeypatch.setattr(common, "_limits", lambda device: Limits(1, 232448))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    like, lines, block = torch.empty(0, dtype=torch.float16), [], (Block(8, 16, 8, 4, 1), 1, 1)
    tuner = tune.Tuner(like, 1, lambda call: 1e-6, lambda launch: None, list, lines.append)
    for group in (head_group(8, 16, 2, 1, 1, like), inference_group(*block, like), training_group(*block, like)):
        for job in group.jobs():
            if isinstance(job, PathJob):
                tuner.measure(job)
    rows = tuner.table["paths"]
    assert {row["op"]: row["shape"] for row in rows} == PATHS, lines
    assert all(row["us_an_image"] == dict.fromkeys(measured.PATHS, 1.0) for row in rows), lines


def test_a_reader_sees_which_tiles_changed_and_which_path_is_the_fastest():
    timed = {"us_an_image": 1.0, "rule_us_an_image": 1.0}
    rows = [{**toy_row(7, 1), **timed}, {**toy_row(8, 2), **timed, "us_an_image": 0.5}]
    us = {"kernels": 3.0, "torch": 2.0}
    paths = [{"op": "head", "shape": {"c_in": 8}, "dtype": "float16", "us_an_image": us}]
    text = "\n".join(tune.lines_of(table(rows, paths)))
    assert "tiles: 2 measured, 1 better than the rule's" in text
    assert "0.500 for     1.000  toy size 8" in text
    assert "3.000     2.000            torch     head c_in 8 float16" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_there_is_a_line_and_nothing_is_written(tmp_path, capsys):
    assert tune.main(["--json", str(tmp_path / "measured.json")]) == 1
    assert capsys.readouterr().err == "bench.tune: torch sees no CUDA GPU here, and nothing else can be measured\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--dtype", "fp32"], ["--alpha", "-1"]], ids=" ".join)
def test_what_cant_be_measured_is_refused(words):
    with pytest.raises(SystemExit) as refused:
        tune.main(words)
    assert refused.value.code == 2
