"""Training that is cut off anywhere and goes on ends with the same bits."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from processes import finish, fork, start
from safetensors.torch import save_file
from samples import write_photos

import train
import validate
from mnv2 import MobileNetV2, checkpoint, session
from mnv2.config import TrainConfig
from mnv2.distributed import StopSignals, World
from mnv2.engine import NotFiniteError
from mnv2.errors import InputError, RunError, Stopped

SMALL = ["--alpha", "0.35", "--resize", "32", "--batch_size", "4", "--num_parallel_workers", "1"]
RATE = ["--max_lr", "0.02"]  # the default's losses grow so that rounding decides whether they stay finite


def differences(one, other, place: str = "") -> list[str]:
    """Where two checkpoints differ in a bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) != set(other):
            return [f"{place}: names"]
        return [found for name in one for found in differences(one[name], other[name], f"{place}.{name}")]
    if isinstance(one, (list, tuple)) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{place}[{number}]")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    return [] if one == other else [place]


def content(path: Path, *, ignore: tuple[str, ...] = ("resume", "ckpt_save_dir")) -> dict:
    """A checkpoint without its times and what may differ."""
    found = torch.load(path, weights_only=True)
    found["progress"].pop("seconds")
    for name in ignore:
        found["config"].pop(name)
    return found


class StopAfter(StopSignals):
    """A signal that comes at one of the looks for it."""

    looks = 0

    def poll(self) -> int:
        StopAfter.looks -= 1
        return signal.SIGTERM if StopAfter.looks == 0 else 0


def until_the_end(config: TrainConfig, looks: Iterable[int], monkeypatch) -> int:
    """Train, cut off after each number of ``looks`` for a signal, and go on; how often it was cut off."""
    monkeypatch.setattr(train, "StopSignals", StopAfter)
    for cuts, number in enumerate(looks):
        StopAfter.looks = number
        try:
            train.train(config, World())
        except Stopped:
            continue
        return cuts
    raise AssertionError("training has not ended")


RECIPES = {
    "plain": {},
    "ema-rmsprop": {"ema_decay": 0.9, "optimizer": "rmsprop", "max_lr": 0.01},
    "accumulate-repeat": {"grad_accum_steps": 2, "repeat_num": 3, "clip_grad_norm": 1.0},
    "fp16-frozen-seldom": {"precision": "fp16", "eval_every": 2, "weight_decay": 1e-4, "nesterov": True},
    "no-evaluation": {"eval_every": 0, "warmup_epochs": 1, "precision": "bf16"},
    "synthetic": {"synthetic": 20, "num_classes": 3, "dropout": 0.5},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_run_cut_off_again_and_again_ends_with_the_same_bits(photos, tmp_path, monkeypatch, recipe):
    shape = {"alpha": 0.35, "resize": 32, "batch_size": 4, "num_parallel_workers": 1, "epoch_size": 3}
    config = TrainConfig(**{**shape, "max_lr": 0.02, **recipe}, data_url=str(photos), resume="auto")
    whole = TrainConfig(**{**vars(config), "ckpt_save_dir": str(tmp_path / "whole"), "resume": None})
    train.train(whole, World())
    cut = TrainConfig(**{**vars(config), "ckpt_save_dir": str(tmp_path / "cut")})
    assert until_the_end(cut, itertools.count(2), monkeypatch) >= 3
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.pt"))
    assert names == sorted(path.name for path in (tmp_path / "cut").glob("*.pt"))
    assert "last.pt" in names
    for name in names:
        assert differences(content(tmp_path / "whole" / name), content(tmp_path / "cut" / name)) == [], name


KILLED = [*SMALL, *RATE, "--epoch_size", "2", "--save_every", "1", "--log_every", "1", "--ema_decay", "0.9"]
KILL = """
import os, signal, sys, train
from mnv2.session import Session
save = Session.save
def killed(self, **settings):
    if (self.progress.epoch, self.progress.step) == (1, int(sys.argv[1])):
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, **settings)
Session.save = killed
sys.exit(train.main(sys.argv[2:]))
"""


def steps_done(folder: Path) -> int:
    log = folder / "log.jsonl"
    return log.read_text().count('"event": "steps"') if log.exists() else 0


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_killed_in_mid_epoch_and_resumed_the_weights_are_the_same_to_the_bit(tmp_path, processes):
    write_photos(tmp_path / "data" / "train", 22 * processes)
    write_photos(tmp_path / "data" / "val", 5, start=100)
    words = [*KILLED, "--data_url", tmp_path / "data"]
    whole = finish(start("train.py", *words, "--ckpt_save_dir", tmp_path / "whole", processes=processes))
    assert [one.returncode for one in whole] == [0] * processes, whole[0].stderr
    (tmp_path / "kill.py").write_text(KILL)
    cut = [tmp_path / "kill.py", 4, *words, "--ckpt_save_dir", tmp_path / "cut"]
    killed = finish(start(*cut, processes=processes))
    assert killed[0].returncode == -signal.SIGKILL, killed[0].stderr
    assert all(one.returncode != 0 for one in killed)
    before = content(tmp_path / "cut" / "last.pt")["progress"]
    assert (before["epoch"], before["step"]) == (1, 3)
    words += ["--ckpt_save_dir", tmp_path / "cut", "--resume", "auto"]
    resumed = finish(start("train.py", *words, processes=processes))
    assert [one.returncode for one in resumed] == [0] * processes, resumed[0].stderr
    assert re.search(r"goes on from .*last.pt: 1 epochs and \d+ steps are done", resumed[0].stdout)
    for name in ("last.pt", "best.pt", "epoch_0001.pt", "epoch_0002.pt"):
        assert differences(content(tmp_path / "whole" / name), content(tmp_path / "cut" / name)) == [], name
    events = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    (again,) = [event for event in events if event["event"] == "resume"]
    assert (again["epoch"], again["step"]) == (before["epoch"], before["step"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_stops(photos, tmp_path, processes, number):
    """One process of two gets it, both stop after the same step."""
    words = [*SMALL, "--data_url", photos, "--ckpt_save_dir", tmp_path, "--epoch_size", 1000, "--log_every", 1]
    started = start("train.py", *words, processes=processes)
    while steps_done(tmp_path) < 2:
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    started[-1].send_signal(number)
    done = finish(started)
    assert [one.returncode for one in done] == [128 + number] * processes
    told = done[0].stderr.splitlines()
    assert re.match(rf"train.py: stopped by {number.name}, \d+ epochs and \d+ steps are done and saved in ", told[-1])
    assert "Traceback" not in "".join(one.stderr for one in done)
    saved = content(tmp_path / "last.pt")["progress"]
    assert f"stopped by {number.name}, {saved['epoch']} epochs and {saved['step']} steps are done" in told[-1]
    assert not list(tmp_path.glob(".writing-*"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> tuple[Path, list[str]]:
    """A finished run of one epoch, and its command line."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*SMALL, *RATE, "--data_url", str(photos), "--epoch_size", "1"]
    assert train.main([*words, "--ckpt_save_dir", str(folder)]) == 0
    return folder, words


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the finished run's folder."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_left_as_it_is(trained, folder, capsys):
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert train.main([*trained[1], "--ckpt_save_dir", str(folder), "--resume", "auto"]) == 0
    assert "last.pt has done 1 epochs of 1: nothing is left to do" in capsys.readouterr().out
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_more_epochs_go_on_and_what_has_changed_is_said(trained, folder, capsys):
    words = [*trained[1], "--ckpt_save_dir", str(folder), "--resume", "--epoch_size", "2", "--max_lr", "0.01"]
    assert train.main(words) == 0
    output = capsys.readouterr().out
    assert "--epoch_size was 1 so far and is 2 from here on" in output
    assert "--max_lr was 0.02 so far and is 0.01 from here on" in output
    assert "lr:0.00500" in output
    assert sorted(path.name for path in folder.glob("epoch_*")) == ["epoch_0001.pt", "epoch_0002.pt"]


def test_another_run_in_the_folder_is_put_aside_and_not_mixed_up(trained, folder, tmp_path):
    """A run that goes on from elsewhere, or from an older checkpoint, keeps no other's epochs and best."""
    words = [*trained[1], "--ckpt_save_dir", str(folder), "--resume"]
    assert train.main([*words, "auto", "--epoch_size", "3"]) == 0
    assert train.main([*words, str(folder / "epoch_0001.pt"), "--epoch_size", "2", "--max_lr", "0.01"]) == 0
    names = ["best.pt", "epoch_0001.pt", "epoch_0002.pt", "last.pt"]
    assert sorted(path.name for path in folder.glob("*.pt")) == names
    (earlier,) = folder.glob("earlier-*")
    assert sorted(path.name for path in earlier.glob("epoch_*")) == ["epoch_0002.pt", "epoch_0003.pt"]
    assert torch.load(folder / "best.pt", weights_only=True)["progress"]["best_epoch"] == 2


def test_weights_that_have_diverged_are_not_saved(trained, folder, capsys):
    before = (folder / "last.pt").read_bytes()
    words = [*trained[1], "--ckpt_save_dir", str(folder), "--resume", "--epoch_size", "2", "--save_every", "1"]
    assert train.main([*words, "--max_lr", "1e30"]) == 1
    assert re.search(r"train.py: (the loss of step \d+ is|a weight is no longer finite)", capsys.readouterr().err)
    first = torch.load(folder / "epoch_0001.pt", weights_only=True)
    last = torch.load(folder / "last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in last["model"].values() if tensor.is_floating_point())
    assert (folder / "epoch_0001.pt").read_bytes() == before
    assert first["progress"]["epoch"] == 1


def test_an_evaluation_that_fails_does_not_end_training(trained, tmp_path, monkeypatch, capsys):
    real = session.evaluate

    def evaluate(*arguments, calls=[]):  # noqa: B006  # counts across calls
        calls.append(1)
        if len(calls) == 1:
            raise NotFiniteError("no accuracy: the network gives NaN for 3 of 11 pictures")
        return real(*arguments)

    monkeypatch.setattr(session, "evaluate", evaluate)
    assert train.main([*trained[1], "--epoch_size", "2", "--ckpt_save_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Evaluation:[0/2], model: no accuracy: the network gives NaN for 3 of 11 pictures" in lines
    assert torch.load(tmp_path / "best.pt", weights_only=True)["progress"]["best_epoch"] == 2


def test_momentum_can_not_come_from_nowhere(trained, tmp_path, capsys):
    words = [*trained[1], "--ckpt_save_dir", str(tmp_path), "--optimizer", "rmsprop", "--max_lr", "1e-4"]
    assert train.main([*words, "--momentum", "0"]) == 0
    assert train.main([*words, "--epoch_size", "2", "--resume"]) == 1
    assert "is of training with --momentum 0.0, got --momentum 0.9" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_anew_and_says_so(trained, tmp_path, capsys):
    assert train.main([*trained[1], "--ckpt_save_dir", str(tmp_path), "--resume", "auto"]) == 0
    assert f"--resume auto: there is no {tmp_path}/last.pt yet" in capsys.readouterr().out
    assert differences(content(tmp_path / "last.pt"), content(trained[0] / "last.pt")) == []


def test_a_new_run_puts_an_earlier_one_aside(trained, folder, capsys):
    before = (folder / "last.pt").read_bytes()
    assert train.main([*trained[1], "--ckpt_save_dir", str(folder), "--max_lr", "0.03"]) == 0
    (earlier,) = folder.glob("earlier-*")
    assert f"the checkpoints of an earlier run are in {earlier} now" in capsys.readouterr().out
    assert sorted(path.name for path in earlier.iterdir()) == ["best.pt", "epoch_0001.pt", "last.pt"]
    assert (earlier / "last.pt").read_bytes() == before != (folder / "last.pt").read_bytes()
    assert checkpoint.set_aside(str(folder)) != str(earlier)


def test_a_checkpoint_is_plain_and_its_weights_are_torchvisions(trained, capsys):
    path = trained[0] / "best.pt"
    found = torch.load(path, weights_only=True)
    assert sorted(found) == sorted(checkpoint._KEYS)
    assert TrainConfig(**found["config"]).alpha == 0.35
    assert found["progress"]["best_epoch"] == 1
    MobileNetV2(0.35, 3).load_state_dict(found["model"])
    assert all(tensor.is_contiguous() for tensor in found["model"].values())
    words = [*SMALL, "--data_url", trained[1][trained[1].index("--data_url") + 1]]
    assert validate.main([*words, "--pretrained", str(path), "--fold", "False"]) == 0  # to the last digit
    share = found["progress"]["best_top1"]
    assert f"'Top_1_Accuracy': {share}" in capsys.readouterr().out


def edited(name, value):
    def edit(path):
        found = torch.load(path, weights_only=True)
        place = found
        *parents, last = name.split(".")
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
        torch.save(found, path)

    return edit


def truncated(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


REFUSED = {
    "truncated": (truncated, "", r"last.pt is truncated, damaged .*\); there is also .*epoch_0001.pt"),
    "empty": (lambda path: path.write_bytes(b""), "", "last.pt is truncated, damaged or no checkpoint"),
    "weights": (lambda path: save_file({"a": torch.ones(1)}, path), "", "last.pt is truncated, damaged or"),
    "no-optimizer": (edited("optimizer", None), "", "last.pt is no checkpoint of training, since it lacks 'optimizer'"),
    "no-list": (edited("loader", 3), "", "last.pt is damaged: expected a list as its 'loader'"),
    "no-state": (edited("random", [{}]), "", r"last.pt is damaged \(KeyError: 'cpu'\)"),
    "other-names": (edited("optimizer", {}), "", r"last.pt is damaged \(KeyError: 'state'\)"),
    "dangling": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "", "can't read .*last.pt: No such file"),
    "alpha": (None, "--alpha 0.5", "last.pt is of training with --alpha 0.35, got --alpha 0.5"),
    "mean": (None, "--preprocessing tf", r"of training with pictures of mean and std \(\(123.*, got .*127.5"),
    "no-alpha": (edited("config.alpha", "x"), "", "last.pt is damaged: expected its --alpha, got 'x'"),
    "batch": (None, "--batch_size 5", "last.pt is of training with --batch_size 4, got --batch_size 5"),
    "classes": (None, "--num_classes 7", "last.pt is of training with 3 classes, got 7 classes"),
    "seed": (None, "--seed 1", "last.pt is of training with --seed 0, got --seed 1"),
    "ema": (None, "--ema_decay 0.9", "last.pt is of training with --ema_decay 0.0, got --ema_decay 0.9"),
    "listing": (
        edited("listing.sha256", "0" * 64),
        "",
        r"last.pt is of training on another listing of pictures \(23 pictures, SHA-256 000000000000\), got 23 pictures",
    ),
    "numbering": (
        edited("classes", ["bee", "ant", "cat"]),
        "--class_index folders",
        r"last.pt is of training with classes numbered \['bee', 'ant', 'cat'\], got classes numbered \['ant'",
    ),
    "processes": (edited("loader", [{}, {}]), "", "last.pt is of training with 2 processes, got 1 processes"),
    "missing": (os.unlink, "--resume {folder}/last.pt", "can't read .*last.pt: No such file .*; there is also"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_another_training_is_refused(trained, folder, capsys, edit, words, message):
    path = folder / "last.pt"
    path.write_bytes(path.read_bytes())  # not the same file as best.pt
    if edit is not None:
        edit(path)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.exists() and path.suffix == ".pt"}
    argv = [*trained[1], "--ckpt_save_dir", str(folder), "--epoch_size", "2", "--resume", "auto"]
    assert train.main([*argv, *words.format(folder=folder).split()]) == 1
    assert re.match(f"train.py: --resume: .*{message}", capsys.readouterr().err.splitlines()[-1])
    after = {path: path.read_bytes() for path in folder.iterdir() if path.exists() and path.suffix == ".pt"}
    assert after == before


def test_another_world_size_is_refused(trained, folder):
    words = [*trained[1], "--ckpt_save_dir", folder, "--epoch_size", 2, "--resume", "auto"]
    done = finish(start("train.py", *words, processes=2))
    assert [one.returncode for one in done] == [1, 1]
    assert "last.pt is of training with 1 processes, got 2 processes" in done[0].stderr


FULL = """
import resource, sys
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_full_disk_loses_nothing_that_was_saved(trained, folder, tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    words = [*trained[1], "--ckpt_save_dir", folder, "--epoch_size", 2, "--resume", "auto"]
    (done,) = finish([fork(tmp_path / "full.py", *words)])
    assert done.returncode == 1
    assert re.match(r"train.py: can't write to .* \(is the disk full\?\): ", done.stderr.splitlines()[-1])
    assert {path.name: path.read_bytes() for path in folder.glob("*.pt")} == before
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    checkpoint.save(str(tmp_path), {"a": torch.ones(3)})
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(RunError, match=r"can't write to .* \(is the disk full\?\): .*No space left"):
        checkpoint.save(str(tmp_path), {"a": torch.zeros(3)}, epoch=1, best=True, keep_max=3)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_a_killed_process_has_half_written_is_removed(tmp_path):
    (tmp_path / ".writing-abc").write_bytes(b"half")
    (tmp_path / "mine.pt").write_bytes(b"whole")
    with checkpoint.open_folder(TrainConfig(ckpt_save_dir=str(tmp_path))):
        assert os.listdir(tmp_path) == ["mine.pt"]


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    config = TrainConfig(ckpt_save_dir=str(tmp_path))
    with checkpoint.open_folder(config):
        (tmp_path / ".writing-last.pt").write_bytes(b"the other's")
        with pytest.raises(InputError, match="--ckpt_save_dir: another run is writing to "):
            with checkpoint.open_folder(config):
                pass
        assert os.listdir(tmp_path) == [".writing-last.pt"]
    with checkpoint.open_folder(config):
        pass


def test_checkpoints_do_not_lie_among_the_pictures(trained, photos, capsys):
    assert train.main([*trained[1], "--ckpt_save_dir", str(photos / "train" / "runs")]) == 1
    assert "--ckpt_save_dir: expected a folder outside the pictures in " in capsys.readouterr().err
    assert not (photos / "train" / "runs").exists()


def test_a_torn_line_of_the_log_stays_alone(trained, folder):
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"event": "st')
    assert train.main([*trained[1], "--ckpt_save_dir", str(folder), "--epoch_size", "2", "--resume"]) == 0
    lines = (folder / "log.jsonl").read_text().splitlines()
    torn = lines.index('{"event": "st')
    assert json.loads(lines[torn + 1])["event"] == "resume"


def test_the_network_and_its_pictures_are_the_checkpoints_without_a_flag(photos, tmp_path):
    """Padding, epsilon, width and preprocessing, none of them as usual."""
    words = ["--data_url", str(photos), "--resize", "32", "--batch_size", "4", "--ckpt_save_dir", str(tmp_path)]
    own = ["--alpha", "0.35", "--padding", "same", "--norm_eps", "1e-3", "--preprocessing", "tf"]
    assert train.main([*words, *own, "--epoch_size", "1"]) == 0
    assert train.main([*words, "--epoch_size", "2", "--resume"]) == 0
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["progress"]["epoch"] == 2
    expected = {"alpha": 0.35, "padding": "same", "norm_eps": 1e-3, "preprocessing": "tf"}
    assert {name: content["config"][name] for name in expected} == expected


def test_other_evaluations_are_not_compared_with_the_best_so_far(trained, folder, capsys):
    words = [*trained[1], "--ckpt_save_dir", str(folder), "--epoch_size", "2", "--resume"]
    assert train.main([*words, "--preprocessing", "timm"]) == 0
    assert "the best evaluation so far doesn't count from here on" in capsys.readouterr().out
    assert torch.load(folder / "best.pt", weights_only=True)["progress"]["best_epoch"] == 2


def test_the_last_epoch_is_always_evaluated(trained, tmp_path, capsys):
    assert train.main([*trained[1], "--ckpt_save_dir", str(tmp_path), "--epoch_size", "3", "--eval_every", "2"]) == 0
    assert re.findall(r"Evaluation:\[(\d)/3\]", capsys.readouterr().out) == ["1", "2"]


def test_only_the_last_epochs_are_kept(tmp_path):
    for epoch in range(1, 6):
        checkpoint.save(str(tmp_path), {"epoch": epoch}, epoch=epoch, best=epoch == 2, keep_max=2)
    found = {path.name: torch.load(path)["epoch"] for path in tmp_path.iterdir()}
    assert found == {"last.pt": 5, "best.pt": 2, "epoch_0004.pt": 4, "epoch_0005.pt": 5}
    checkpoint.save(str(tmp_path), {"epoch": 6}, epoch=6, keep_max=0)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_checkpoints_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    checkpoint.save(str(tmp_path), {"epoch": 1}, epoch=1, best=True, keep_max=1)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "epoch_0001.pt", "last.pt"]
    assert torch.load(tmp_path / "best.pt") == torch.load(tmp_path / "last.pt")
