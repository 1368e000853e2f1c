"""What `make gpu` runs: with made-up steps order, failures, advice, going on, time; and what its own steps do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from processes import environment as users_environment

from bench import dali_gpu, environment, gpu, gpu_steps, steps, training_curves, two_ranks
from bench.steps import Step, run_steps
from mnv2.errors import RunError

KEY = {"commit": "abc", "device": "a GPU"}


def python(name: str, *lines: str, seconds: float = 60.0, **more: str) -> Step:
    """A step of one line of Python or several, each a command."""
    commands = tuple((sys.executable, "-S", "-c", line) for line in lines)
    return Step(name, commands, seconds, f"look at {name}'s {{log}}", **more)


def noted(folder: Path, name: str) -> str:
    """A line of Python that notes that it has run."""
    return f"print({name!r}, file=open({str(folder / 'order')!r}, 'a')); print('said by', {name!r})"


def order(folder: Path) -> list[str]:
    path = folder / "order"
    return path.read_text().split() if path.exists() else []


@pytest.fixture
def three(tmp_path):
    """Three steps, the second of which fails while there is a file."""
    fails = f"import os, sys; sys.exit(3 * os.path.exists({str(tmp_path / 'broken')!r}))"
    return [
        python("first", noted(tmp_path, "a"), noted(tmp_path, "b")),
        python("second", noted(tmp_path, "c"), fails, noted(tmp_path, "never")),
        python("third", noted(tmp_path, "e")),
    ]


def test_steps_run_in_order_and_are_logged(tmp_path, three, capfd):
    assert run_steps(three, tmp_path / "out", KEY) == 0
    assert order(tmp_path) == ["a", "b", "c", "never", "e"]
    log = (tmp_path / "out" / "01-first.log").read_text()
    assert "said by a\n" in log
    assert log.count("$ ") == 2
    printed = capfd.readouterr().out
    assert "[1/3] first: at most 60 s, output in " in printed
    assert "    said by b\n" in printed
    assert "[3/3] third: done in " in printed


def test_the_first_failure_stops_and_the_next_run_goes_on_there(tmp_path, three, capfd):
    (tmp_path / "broken").touch()
    assert run_steps(three, tmp_path / "out", KEY) == 1
    assert order(tmp_path) == ["a", "b", "c"]
    log = tmp_path / "out" / "02-second.log"
    error = capfd.readouterr().err
    assert error == f"bench.gpu: second has failed (exit status 3): look at second's {log}\n"
    state = json.loads((tmp_path / "out" / steps.STATE).read_text())
    assert state["key"] == KEY
    assert [entry["status"] for entry in state["steps"].values()] == ["done", "failed"]
    (tmp_path / "broken").unlink()
    assert run_steps(three, tmp_path / "out", KEY) == 0
    assert order(tmp_path)[3:] == ["c", "never", "e"]
    assert "[1/3] first: done before" in capfd.readouterr().out
    assert run_steps(three, tmp_path / "out", KEY) == 0
    assert len(order(tmp_path)) == 6


@pytest.mark.parametrize(
    ("key", "again", "steps_again"),
    [({**KEY, "commit": "def"}, False, 2), ({**KEY, "device": "another"}, False, 2), (KEY, True, 2), (KEY, False, 0)],
    ids=["another commit", "another GPU", "--again", "the same"],
)
def test_what_starts_anew(tmp_path, key, again, steps_again):
    two = [python(name, noted(tmp_path, name)) for name in ("a", "b")]
    assert run_steps(two, tmp_path, KEY) == 0
    assert run_steps(two, tmp_path, key, again=again) == 0
    assert len(order(tmp_path)) == 2 + steps_again


def test_a_step_to_another_extent_is_done_again_and_a_broken_state_is_none(tmp_path):
    assert run_steps([python("a", noted(tmp_path, "quick"), extent="quick")], tmp_path, KEY) == 0
    assert run_steps([python("a", noted(tmp_path, "whole"))], tmp_path, KEY) == 0
    for text in ("{", "[]", '{"key": 1}'):
        (tmp_path / steps.STATE).write_text(text)
        assert run_steps([python("a", noted(tmp_path, "whole"))], tmp_path, KEY) == 0
    assert order(tmp_path) == ["quick", *["whole"] * 4]


def test_a_step_over_its_time_has_failed_and_leaves_nothing_behind(tmp_path, capfd):
    child = f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w')); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    assert run_steps([python("slow", starts, seconds=1.4)], tmp_path, KEY) == 1
    assert "slow has taken longer than its 1 s (--minutes gives more): look at slow's" in capfd.readouterr().err
    deadline = time.monotonic() + 10
    with suppress(FileNotFoundError, ProcessLookupError):  # of a slow machine's child that hadn't begun, too
        stat = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
        while stat.read_text().rpartition(")")[2].split()[0] not in "ZX":  # ended, and perhaps nobody's to ask
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert json.loads((tmp_path / steps.STATE).read_text())["steps"]["slow"]["status"] == "failed"


def test_time_that_is_left_over_is_the_next_steps(tmp_path, capfd):
    some = [
        python("a", "pass", seconds=100.0),
        python("b", "pass", seconds=50.0, why_not="there is no second GPU"),
        python("c", "pass", seconds=10.0),
    ]
    assert run_steps(some, tmp_path, KEY) == 0
    limits = [line for line in capfd.readouterr().out.splitlines() if "at most" in line]
    assert "at most 100 s" in limits[0]
    assert 150 < float(limits[1].split("at most ")[1].split()[0]) <= 160
    state = json.loads((tmp_path / steps.STATE).read_text())["steps"]
    assert (state["b"]["status"], state["b"]["why"]) == ("not run", "there is no second GPU")


def test_ctrl_c_ends_with_130_and_keeps_what_is_done(tmp_path, capfd):
    two = [python("a", "pass"), python("b", "import time; time.sleep(30)")]
    main = threading.main_thread().ident
    log = tmp_path / "02-b.log"

    def interrupt() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_steps(two, tmp_path, KEY) == 130
    assert "interrupted in b" in capfd.readouterr().err
    state = json.loads((tmp_path / steps.STATE).read_text())["steps"]
    assert {name: entry["status"] for name, entry in state.items()} == {"a": "done"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "run_steps", lambda *words, **more: pytest.fail("it ran"))
    assert gpu.main(["--minutes", "10"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "bench.gpu: needs a CUDA GPU, torch sees none, so nothing was run\n"
    assert captured.out == ""


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "some"])
def test_bad_minutes(minutes, capsys):
    with pytest.raises(SystemExit) as raised:
        gpu.main([f"--minutes={minutes}"])
    assert raised.value.code == 2
    assert "--minutes" in capsys.readouterr().err


def test_with_a_gpu_the_steps_status_is_returned(monkeypatch):
    given = {}
    monkeypatch.setattr(gpu, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H")
    monkeypatch.setattr(gpu, "run_steps", lambda *words, **more: given.update(more, key=words[2]) or 130)
    assert gpu.main(["--again"]) == 130
    assert given["again"]
    assert given["key"]["device"] == "H"
    assert "-" not in given["key"]["commit"]


def test_the_steps_and_their_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    whole, quick = gpu_steps.steps(30), gpu_steps.steps(10)
    names = ["environment", "tests", "dali", "tune", "bench", "training", "two-ranks", "report"]
    assert [step.name for step in whole] == [step.name for step in quick] == names
    assert sum(step.seconds for step in whole) == pytest.approx(1800)
    assert sum(step.seconds for step in quick) == pytest.approx(600)
    words = {step.name: [" ".join(command[1:]) for command in step.commands] for step in whole}
    assert all("--all" in command for command in words["tests"])
    assert words["bench"] == ["-m pytest bench/bench_network.py bench/bench_kernels.py --record"]
    assert all(" -m gpu " in command for command in words["tests"])
    assert not any("--all" in command for step in quick for command in step.commands)
    assert "--quick" in quick[4].commands[0]
    assert [step.name for step, other in zip(whole, quick, strict=True) if step.extent != other.extent] == [
        "tests",
        "bench",
    ]
    assert quick[6].why_not == "it needs two GPUs, torch sees 1"
    assert not quick[2].why_not
    monkeypatch.setattr(gpu_steps, "installed", lambda name: name != "nvidia.dali")
    assert gpu_steps.steps(30)[2].why_not == "DALI isn't installed"
    monkeypatch.undo()
    assert not gpu_steps.installed("nobodys.module")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert not any(step.why_not for step in gpu_steps.steps(30))
    for step in whole:
        assert "{log}" in step.advice
        step.advice.format(log="a log")


def test_every_module_that_a_step_names_is_there():
    there = {path.stem for path in Path(gpu.__file__).parent.glob("*.py")} | {"tune", "report"}
    for step in gpu_steps.steps(30):
        for command in step.commands:
            assert command[2] == "pytest" or command[2].removeprefix("bench.") in there


def test_the_environment_is_written_without_a_gpu_too(tmp_path, capsys):
    file = tmp_path / "folder" / "environment.json"
    assert environment.main([str(file)]) == 0
    found = json.loads(file.read_text())
    assert {"versions", "device", "cuda", "gpus", "nvidia_smi"} <= found.keys()
    assert json.loads(capsys.readouterr().out) == found


def test_what_nvidia_smi_says(monkeypatch):
    line = ", ".join(map(str, range(len(environment.QUERIED))))
    ran = subprocess.CompletedProcess([], 0, f"{line}\n{line}\n", "")
    monkeypatch.setattr(environment.subprocess, "run", lambda *words, **more: ran)
    found = environment.of_nvidia_smi()
    assert len(found) == 2
    assert found[0]["driver_version"] == "1"
    ran.returncode, ran.stderr = 9, "no driver\n"
    assert environment.of_nvidia_smi() == "no driver"

    def missing(*words, **more):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert environment.of_nvidia_smi() == "FileNotFoundError: nvidia-smi"


def test_the_loaders_pipelines_are_compared(tmp_path, capsys):
    assert dali_gpu.main(["--device", "cpu", "--pictures", "18", "--resize", "32"]) == 0
    assert "18 pictures, labels and order the same on cpu and cpu; mean absolute" in capsys.readouterr().out
    one = dali_gpu.batches(dali_gpu.write_pictures(tmp_path, 18), 32, torch.device("cpu"))
    assert dali_gpu.compare(one, one) == [0.0] * 18
    first, last = one
    with pytest.raises(RunError, match="gives 1 batches, the CPU's 2"):
        dali_gpu.compare([first], one)
    with pytest.raises(RunError, match="batch 0: .* other pictures or labels"):
        dali_gpu.compare([first._replace(labels=first.labels.roll(1)), last], one)
    near = first._replace(images=first.images + 1 / 57)
    assert 0.5 < max(dali_gpu.compare([near, last], one)) < 1.1
    worse = first.images.clone()
    worse[3] += 0.1
    with pytest.raises(RunError, match=r"by [0-9.]+ in picture 3 \(at most 2.0\)"):
        dali_gpu.compare([first._replace(images=worse), last], one)
    with pytest.raises(RunError, match="pixels differ by nan"):
        dali_gpu.compare([first._replace(images=first.images * float("nan")), last], one)


SHORT = training_curves.CurvesConfig(8, 0.1, 32, 4, "fp16", "torch", "cpu")


def test_curves_of_the_same_backend_are_the_same_and_another_orders_is_not():
    cpu = torch.device("cpu")
    first, again, other = (training_curves.losses(SHORT, cpu, "torch", order) for order in (1, 1, 2))
    assert len(first) == SHORT.steps
    assert first == again
    assert first != other


def test_the_criterion_of_the_curves():
    def curves(kernels: float, other: float = 1.1, start: float = 2.3) -> dict[str, list[float]]:
        ends = {"torch": 1.0, "kernels": kernels, "torch, other order": other}
        return {name: [start] * 30 + [end] * 10 for name, end in ends.items()}

    assert training_curves.verdict(curves(1.2))["difference"] == pytest.approx(0.2)
    with pytest.raises(RunError, match=r"kernels and torch end 0.3000 apart, allowed 0.2460"):
        training_curves.verdict(curves(1.3))
    with pytest.raises(RunError, match="kernels and torch end 0.0500 apart, allowed 0.0460"):
        training_curves.verdict(curves(1.05, other=1.0))
    for wrong in (2.4, float("nan")):
        with pytest.raises(RunError, match="kernels: expected a last loss under the first"):
            training_curves.verdict(curves(wrong))


def test_the_curves_command(tmp_path, monkeypatch, capsys):
    falling = {1: [2.0, 1.5, *[1.0] * 6], 2: [2.0, 1.5, *[1.1] * 6]}
    monkeypatch.setattr(training_curves, "losses", lambda config, device, backend, order: falling[order])
    file = tmp_path / "folder" / "curves.json"
    words = ["--steps", "8", "--device", "cpu", "--backend", "torch", "--json", str(file)]
    assert training_curves.main(words) == 0
    assert "difference 0.0" in capsys.readouterr().out
    assert set(json.loads(file.read_text())["curves"]) == {"torch", "kernels", "torch, other order"}
    falling[1] = [1.0] * 8
    assert training_curves.main(words) == 1
    assert capsys.readouterr().err.startswith("bench.training_curves: torch: expected a last loss under the first")


def test_two_ranks_must_give_one_processs_digits(tmp_path, monkeypatch, capsys):
    ran = []

    def printed(speed: str, right: int) -> str:
        return f"weights\n360 pictures, loss 0.5, {speed} pictures a second\ntop-1: {right}\ntop-5\n{{}}\n"

    outputs = iter(["", "", printed("100.5", 7), printed("190.1", 7), "", "", printed("1", 7), printed("1", 8)])

    def run(command, **more):
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, next(outputs))

    monkeypatch.setattr(two_ranks.subprocess, "run", run)
    assert two_ranks.main([str(tmp_path)]) == 0
    assert ["torch.distributed.run" in command for command in ran] == [False, True, False, True]
    assert all(tuple(c[c.index("--device") :][:2]) == ("--device", "cuda") for c in ran[1:])
    assert two_ranks.main([str(tmp_path)]) == 1
    assert "one process and two disagree" in capsys.readouterr().err
    monkeypatch.setattr(
        two_ranks.subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 2, "")
    )
    assert two_ranks.main([str(tmp_path)]) == 1
    assert "mnv2.digits" in capsys.readouterr().err


@pytest.mark.parametrize("marks", [(), ("gpu",)], ids=["not for a GPU", "for a GPU"])
def test_only_tests_for_a_gpu_see_one(marks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    marked = SimpleNamespace(get_closest_marker=lambda name: name if name in marks else None)
    protocol = conftest.pytest_runtest_protocol(marked)
    next(protocol)
    assert torch.cuda.is_available() == bool(marks)
    protocol.close()
    assert torch.cuda.is_available()
    assert users_environment()["CUDA_VISIBLE_DEVICES"] == ""
