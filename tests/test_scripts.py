"""The scripts as users run them: in one process, under torchrun, and with everything that can be given wrongly."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, finish, fork, popen, run, start
from samples import photo, save_weights, settled, steady, write_photos
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
import validate
from mnv2 import MobileNetV2, data, inputs, pretrained
from mnv2.config import TrainConfig
from mnv2.data import Augmentation, Loader, profile
from mnv2.distributed import World
from mnv2.engine import evaluate
from mnv2.files import list_pictures
from mnv2.logs import evaluation_lines, with_progress

SMALL = ["--alpha", "0.35", "--resize", "32"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint that tells the three classes of the photographs apart at random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "last.pt"
    model = settled(MobileNetV2(0.35, num_classes=3))
    save_weights(path, model, ["ant", "bee", "cat"])
    return path


def test_the_result_is_the_same_for_any_number_of_processes(photos, weights, capsys):
    """Eleven pictures; with eight processes some have one and some two, with batches of 4 all tails differ."""
    words = [*SMALL, "--data_url", photos, "--pretrained", weights, "--batch_size", 4]
    assert validate.main(list(map(str, words))) == 0
    expected = steady(capsys.readouterr().out)[-4:]
    assert expected[0].startswith("11 pictures, loss ")
    for done in (run("validate.py", *words, processes=3), finish(start("validate.py", *words, processes=8))[0]):
        assert done.returncode == 0, done.stderr
        assert steady(done.stdout)[-4:] == expected
    for batch_size in (1, 11, 64):
        assert validate.main([*map(str, words[:-1]), str(batch_size)]) == 0
        assert steady(capsys.readouterr().out)[-3:] == expected[-3:]


def test_more_processes_than_pictures(tmp_path, weights):
    write_photos(tmp_path / "val", 2)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir()
    words = [*SMALL, "--data_url", tmp_path, "--pretrained", weights]
    done = finish(start("validate.py", *words, processes=3))[0]
    assert done.returncode == 0, done.stderr
    assert "2 pictures, loss" in done.stdout
    assert set(ast.literal_eval(done.stdout.splitlines()[-1])) == {"Top_1_Accuracy", "Top_5_Accuracy"}


def test_training_prints_the_references_lines_and_saves(photos, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    words = [*SMALL, "--data_url", photos, "--epoch_size", 2, "--batch_size", 8, "--ckpt_save_dir", folder]
    assert train.main(list(map(str, words))) == 0
    lines = capsys.readouterr().out.splitlines()
    averages = []
    for epoch, lr in enumerate(("0.10000", "0.05000")):
        first, second = [i for i, line in enumerate(lines) if line.startswith("Epoch")][2 * epoch : 2 * epoch + 2]
        pattern = rf"Epoch:\[{epoch}/2\], step:\[2/2\], loss:\[\d+\.\d{{3}}/\d+\.\d{{3}}\], time:\d+\.\d{{3}}, lr:{lr}"
        assert re.fullmatch(pattern, lines[first])
        pattern = r"Epoch time:\d+\.\d{3}, per step time:\d+\.\d{3}, avg loss:\d+\.\d{3}"
        assert re.fullmatch(pattern, lines[second])
        averages.append(lines[second].split(", ")[-1])
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    begin = events[0]
    assert (begin["event"], begin["steps_per_epoch"], begin["num_classes"], begin["processes"]) == ("start", 2, 3, 1)
    assert begin["config"]["batch_size"] == 8
    assert begin["versions"]["torch"] == torch.__version__
    kinds = [event["event"] for event in events[1:]]
    assert kinds == ["epoch", "evaluation"] * 2
    epochs, evaluations = events[1::2], events[2::2]
    assert [(line["epoch"], line["learning_rate"]) for line in epochs] == [(0, 0.1), (1, pytest.approx(0.05))]
    assert [(line["epoch"], line["weights"], line["pictures"]) for line in evaluations] == [
        (0, "model", 11),
        (1, "model", 11),
    ]
    assert averages == [f"avg loss:{line['loss_mean']:.3f}" for line in epochs]
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["classes"] == ["ant", "bee", "cat"]
    assert content["progress"]["epoch"] == 2

    assert validate.main([*SMALL, "--data_url", str(photos), "--pretrained", str(folder / "last.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("11 pictures, loss")
    assert "class numbers: the weights' own record" in lines


def test_tensorboard_on_request(tmp_path, capsys):
    words = [*SMALL, "--synthetic", "8", "--batch_size", "8", "--epoch_size", "1", "--ckpt_save_dir", str(tmp_path)]
    assert train.main([*words, "--tensorboard"]) == 0
    assert [path.name.split(".")[0] for path in (tmp_path / "tensorboard").iterdir()] == ["events"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_progress_bar_on_a_terminal_and_none_in_a_pipe(monkeypatch, rank):
    for stream, shown in ((Terminal(), rank == 0), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(with_progress([1, 2, 3], 3, "epoch 0", World(rank, 2))) == [1, 2, 3]
        assert ("epoch 0: 100%" in stream.getvalue() or "epoch 0:   0%" in stream.getvalue()) == shown


def test_two_processes_train_one_network(photos, tmp_path):
    words = [*SMALL, "--data_url", photos, "--epoch_size", 2, "--batch_size", 5, "--max_lr", 0.01]
    done, other = finish(start("train.py", *words, "--ckpt_save_dir", tmp_path, processes=2))
    assert (done.returncode, other.returncode) == (0, 0), done.stderr + other.stderr
    assert "step:[2/2]" in done.stdout
    assert done.stdout.count("Epoch:[0/2]") == 1
    assert other.stdout == ""
    names = ["best.pt", "epoch_0001.pt", "epoch_0002.pt", "last.pt", "log.jsonl"]
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "log.jsonl").read_text().count('"event": "start"') == 1


def test_a_subset_of_imagenet_is_numbered_as_imagenet(tmp_path, capsys):
    write_photos(tmp_path / "val", 3, classes=("n02123394", "n01440764", "n15075141"))
    words = [*SMALL, "--data_url", str(tmp_path), "--pretrained", "False"]
    assert validate.main([*words, "--num_classes", "1000"]) == 0
    assert "class numbers: ImageNet-1k's own order" in capsys.readouterr().out
    assert validate.main(words) == 0
    output = capsys.readouterr().out
    assert "class numbers: the sorted class folders" in output
    assert "3 classes, preprocessing reference, weights: none" in output


def test_a_flat_validation_folder(tmp_path, capsys):
    (tmp_path / "val").mkdir()
    for number in range(4):
        photo(number, 50, 40).save(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    labels = tmp_path / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_{number:08d},n02123394 1 2 3 4 " for number in range(4)]
    labels.write_text("\n".join(["ImageId,PredictionString", *rows]))
    words = [*SMALL, "--data_url", str(tmp_path), "--pretrained", "False", "--num_classes", "1000"]
    assert validate.main([*words, "--val_labels", str(labels)]) == 0
    assert "4 pictures of 1 classes" in capsys.readouterr().out


def test_synthetic_pictures_need_no_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*SMALL, "--synthetic", "24", "--batch_size", "8", "--epoch_size", "1"]) == 0
    assert "step:[3/3]" in capsys.readouterr().out
    assert validate.main([*SMALL, "--synthetic", "10", "--batch_size", "8", "--pretrained", "False"]) == 0
    assert "10 pictures, loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("validate.py", "--data_url nowhere", "--data_url: no folder nowhere; it should hold train/ and val/"),
        ("train.py", "--data_url nowhere", "--data_url: no folder nowhere; it should hold train/ and val/"),
        ("validate.py", "--data_url {photos}", r"--pretrained: no weights of alpha 1.0 at 224 px in .*"),
        ("validate.py", "--data_url {photos} --pretrained no.pth", "--pretrained: can't read no.pth: No such file"),
        (
            "validate.py",
            "--data_url {photos} --alpha 1.0 --pretrained {weights}",
            "--alpha: .*last.pt is of a network with alpha 0.35, got 1.0",
        ),
        ("validate.py", "--data_url {photos} --pretrained False --num_classes 2", "--num_classes: expected at least 3"),
        ("train.py", "--data_url {photos} --batch_size 24", "--batch_size: expected at most 23 for 23 pictures"),
        ("train.py", "--data_url {photos} --class_index imagenet", "--class_index: ImageNet-1k's own order"),
        ("train.py", "--data_url {photos} --class_index no.txt", "--class_index: can't read no.txt"),
        ("train.py", "--synthetic 64 --alpha 0.35 --resize 32 --max_lr 1e30 --epoch_size 9", "the loss of step .* is"),
        ("train.py", "--synthetic --resize 32 --batch_size 1", "--batch_size: expected 2 or more at --resize 32"),
        ("train.py", "--data_url {photos} --freeze features --resume", "--freeze: expected --pretrained FILE"),
        (
            "train.py",
            "--synthetic 64 --grad_accum_steps 65",
            "--batch_size: expected at most 1 for 64 .* --grad_accum_steps 65, and fewer",
        ),
        ("train.py", "--synthetic --ckpt_save_dir /dev/null/x", "--ckpt_save_dir: can't write to /dev/null/x: Not a"),
        ("train.py", "--data_url {photos} --device cuda", "--device: expected a CUDA GPU"),
        ("train.py", "--data_url {photos} --device cpu --backend triton", "--backend triton: expected an NVIDIA GPU"),
        ("validate.py", "--synthetic 4 --device cpu --backend triton", "--backend triton: expected an NVIDIA GPU"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(photos, weights, tmp_path, monkeypatch, capfd, script, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("torch sees a CUDA GPU here, so asking for one is no mistake")
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("kernels.common.INTERPRETED", False)
    monkeypatch.chdir(tmp_path)
    argv = [word.format(photos=photos, weights=weights) for word in words.split()]
    assert {"train.py": train, "validate.py": validate}[script].main(argv) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith(f"{script}: ")]) == 1
    assert re.match(f"{script}: {message}", lines[-1])


def test_a_wrong_flag_exits_with_2():
    done = run("train.py", "--learning_speed", 3)
    assert done.returncode == 2
    assert done.stderr == "train.py: unrecognized arguments: --learning_speed 3 (--help lists the flags)\n"


@pytest.mark.parametrize("bad_files", ["error", "skip"])
def test_bad_files_with_two_processes(photos, weights, tmp_path, bad_files):
    shutil.copytree(photos, tmp_path / "data")
    paths = sorted((tmp_path / "data" / "val").rglob("*.jpg"))
    paths[3].write_bytes(b"")
    paths[4].write_bytes(paths[4].read_bytes()[:500])
    words = [*SMALL, "--data_url", tmp_path / "data", "--pretrained", weights, "--bad_files", bad_files]
    if bad_files == "error":
        done = run("validate.py", *words, processes=2)
        assert done.returncode != 0
        assert f"{paths[3]} is empty; {paths[4]} is a truncated JPEG" in done.stderr
        assert "Accuracy" not in done.stdout
    else:
        done = finish(start("validate.py", *words, processes=2))[0]
        assert done.returncode == 0, done.stderr
        assert f"left out: {paths[3]} is empty\nleft out: {paths[4]} is a truncated JPEG\n" in done.stdout
        assert "9 pictures, loss" in done.stdout


def test_a_launchers_variable_that_can_not_be_used_is_one_line():
    (done,) = finish([fork("train.py", "--synthetic", RANK="one")])
    assert done.returncode == 1
    assert done.stderr == "train.py: RANK: expected an integer in the environment, got 'one'\n"


RECIPE = {
    "alpha": 0.35, "resize": 32, "epoch_size": 3, "batch_size": 5, "max_lr": 0.02, "min_lr": 0.001, "momentum": 0.6,
    "smooth_factor": 0.3, "hflip": 0.2, "crop_scale": (0.5, 0.9), "crop_ratio": (0.8, 1.1), "seed": 7, "dropout": 0.4,
    "padding": "same", "norm_eps": 1e-3, "warmup_epochs": 1, "weight_decay": 1e-3, "num_parallel_workers": 1,
    "save_activations": "X", "preprocessing": "tf",
}  # fmt: skip


def test_training_is_what_its_flags_say(photos, tmp_path, monkeypatch):
    """Every flag reaches what it is for, seen by standing in front of each."""
    seen, rates = {}, []

    def watched(name, original):
        def call(*arguments, **keywords):
            seen[name] = inspect.signature(original).bind(*arguments, **keywords).arguments
            return original(*arguments, **keywords)

        return call

    def stepped(optimizer, *arguments):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(pretrained, "MobileNetV2", watched("MobileNetV2", MobileNetV2))
    for name in ("Augmentation", "Loader"):
        monkeypatch.setattr(inputs, name, watched(name, getattr(inputs, name)))
    monkeypatch.setattr(torch.optim, "SGD", watched("SGD", torch.optim.SGD))
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched("loss", torch.nn.functional.cross_entropy))
    handle = register_optimizer_step_pre_hook(stepped)
    config = TrainConfig(**RECIPE, eval_every=0, data_url=str(photos), ckpt_save_dir=str(tmp_path))
    train.train(config, World())
    handle.remove()

    tf = profile("tf", 32)
    augmentation = {
        "resize": 32,
        "scale": (0.5, 0.9),
        "ratio": (0.8, 1.1),
        "hflip": 0.2,
        "mean": tf.mean,
        "std": tf.std,
    }
    assert seen["Augmentation"] == augmentation
    assert (seen["Loader"]["batch_size"], seen["Loader"]["seed"], seen["Loader"]["threads"]) == (5, 7, 1)
    network = {"alpha": 0.35, "num_classes": 3, "dropout": 0.4, "backend": "auto", "padding": "same", "norm_eps": 1e-3}
    network["save"] = "X"
    assert seen["MobileNetV2"] == network
    assert (seen["SGD"]["momentum"], seen["SGD"]["nesterov"]) == (0.6, False)
    assert [group["weight_decay"] for group in seen["SGD"]["params"]] == [1e-3, 0.0]
    assert seen["loss"]["label_smoothing"] == 0.3
    assert rates == pytest.approx([0.01] * 4 + [0.02] * 4 + [0.0105] * 4)


AVERAGED = """
import copy, torch, train
from mnv2.data import Batch
from mnv2.config import TrainConfig
from mnv2.distributed import world
from mnv2.inputs import TrainingData
from mnv2.pretrained import follow
from mnv2.trainer import Trainer
with world("cpu") as here:
    config = follow(TrainConfig(alpha=0.35, resize=32, batch_size=4, seed=3), None)
    trainer = Trainer(train.make_network(config, here, TrainingData(None, None, None, 3)), config, here)
    trainer.start_epoch(0)
    model = trainer._model
    masks = here.gather(torch.nn.functional.dropout(torch.ones(1000), 0.5))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(here.rank))
    def gradient():
        model.zero_grad()
        torch.manual_seed(0)
        model(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    with model.no_sync():
        own = here.gather(gradient())
    both = here.gather(gradient())
    weights = here.gather(torch.cat([p.detach().flatten() for p in model.parameters()]))
    mean = (own[0] + own[1]) / 2
    def statistics(network):
        return torch.cat([b.flatten() for b in network.buffers() if b.is_floating_point()])
    alone = copy.deepcopy(trainer.network)
    alone(x)
    apart = here.gather(statistics(alone))
    trainer.step(iter([Batch(x, torch.tensor([0, 1, 2, 0]), torch.arange(4))]))
    shared = here.gather(statistics(trainer.network))
    assert torch.equal(shared[0], shared[1]) and not torch.allclose(apart[0], apart[1])
    torch.testing.assert_close(shared[0], (apart[0] + apart[1]) / 2)
    here.print(
        torch.equal(weights[0], weights[1]), torch.equal(both[0], both[1]), not torch.allclose(own[0], own[1]),
        bool((both[0] - mean).norm() < 1e-5 * mean.norm()),
        bool(0.4 < (masks[0] == masks[1]).double().mean() < 0.6),
    )
"""


def test_processes_share_weights_and_gradients_and_not_dropout(tmp_path):
    (tmp_path / "averaged.py").write_text(AVERAGED)
    done = finish(start(tmp_path / "averaged.py", processes=2))[0]
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True True True True True\n"


def test_training_starts_from_the_weights_it_is_given(photos, tmp_path):
    """At a rate of nothing the parameters stay, and so do the names of the classes in their own order."""
    given = tmp_path / "given.pt"
    model = MobileNetV2(0.35, num_classes=3)
    save_weights(given, model, ["cat", "ant", "bee"])
    words = [*SMALL, "--data_url", str(photos), "--batch_size", "8", "--epoch_size", "1", "--max_lr", "1e-30"]
    assert train.main([*words, "--pretrained", str(given), "--ckpt_save_dir", str(tmp_path)]) == 0
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["classes"] == ["cat", "ant", "bee"]
    assert all((content["model"][name] - p).abs().max() < 1e-20 for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["reference", "torchvision", "timm", "tf"])
def test_evaluation_is_what_its_flags_say(photos, tmp_path, name, capsys):
    """At 96 px no two profiles are the same; padding, epsilon and smoothing are not the defaults."""
    path = str(tmp_path / "last.pt")
    model = settled(MobileNetV2(0.35, 3, padding="same", norm_eps=1e-3), 96)
    save_weights(path, model, ["bee", "cat", "ant"], padding="same", norm_eps=1e-3)
    words = [
        "--alpha",
        "0.35",
        "--resize",
        "96",
        "--preprocessing",
        name,
        "--smooth_factor",
        "0.4",
        "--padding",
        "same",
    ]
    assert validate.main([*words, "--norm_eps", "1e-3", "--data_url", str(photos), "--pretrained", path]) == 0
    pictures = list_pictures(str(photos), "val")
    labels = [["bee", "cat", "ant"].index(name) for name in pictures.names]
    loader = Loader(pictures.paths, labels, profile(name, 96), batch_size=64, world=World())
    expected = evaluation_lines(evaluate(model, loader, 11, World(), 0.4), 0.4)
    assert steady(capsys.readouterr().out)[-4:] == steady(expected)


@pytest.mark.parametrize("processes", [1, 3])
def test_real_photographs(test_data, processes):
    words = ["--alpha", "1.0", "--resize", "224", "--preprocessing", "torchvision"]
    words += ["--pretrained", test_data / "mobilenetv2_1.0_224_real.safetensors"]
    words += ["--data_url", test_data / "imagenet_samples"]
    done = run("validate.py", *words, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "class numbers: ImageNet-1k's own order" in done.stdout
    assert "top-1: 170 of 200 right" in done.stdout
    assert "top-5: 195 of 200 right" in done.stdout
    assert done.stdout.splitlines()[-1] == "{'Top_1_Accuracy': 0.85, 'Top_5_Accuracy': 0.975}"


def test_training_is_the_recipe_written_out(photos, tmp_path):
    """Two epochs of `train.py` against a plain loop over the same loader, to the bit."""
    config = TrainConfig(
        alpha=0.35, resize=32, batch_size=5, epoch_size=2, max_lr=0.02, weight_decay=1e-3, seed=3,
        num_parallel_workers=1, eval_every=0, data_url=str(photos), ckpt_save_dir=str(tmp_path),
    )  # fmt: skip
    train.train(config, World())
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]

    pictures = list_pictures(str(photos), "train")
    labels = [["ant", "bee", "cat"].index(name) for name in pictures.names]
    loader = Loader(pictures.paths, labels, Augmentation(32), batch_size=5, world=World(), threads=1, seed=3)
    torch.manual_seed(3)
    model = MobileNetV2(0.35, 3)
    torch.manual_seed(3)
    model.train()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1e-3}, {"params": others}], 0.02, 0.9)
    for rate in (0.02, 0.01):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Weights of three classes that are called otherwise than the photographs'."""
    path = tmp_path_factory.mktemp("given") / "given.pt"
    torch.manual_seed(1)
    save_weights(path, settled(MobileNetV2(0.35, num_classes=3)), ["dog", "emu", "fox"])
    return path


STILL = ["--batch_size", "8", "--epoch_size", "1", "--max_lr", "1e-30"]


def trained_from(path, photos, folder, *words) -> tuple[dict, dict]:
    """Weights before and after an epoch at a rate of nothing."""
    words = [*SMALL, *STILL, "--data_url", photos, "--ckpt_save_dir", folder, "--pretrained", path, *words]
    assert train.main(list(map(str, words))) == 0
    return torch.load(path, weights_only=True), torch.load(folder / "last.pt", weights_only=True)


def test_fine_tuning_makes_a_new_classifier_for_other_classes(photos, given, tmp_path, capsys):
    before, after = trained_from(given, photos, tmp_path)
    assert "; a new classifier of 3 classes in place of its 3" in capsys.readouterr().out
    assert after["classes"] == ["ant", "bee", "cat"]
    for name, tensor in before["model"].items():
        if name.startswith("classifier"):
            assert not torch.equal(after["model"][name], tensor) or name.endswith("bias")
        elif tensor.dim() > 1:
            assert torch.equal(after["model"][name], tensor), name


def test_fine_tuning_from_more_outputs_than_classes(photos, tmp_path, capsys):
    torch.save(settled(MobileNetV2(0.35, num_classes=1000)).state_dict(), tmp_path / "plain.pth")
    words = [*SMALL, *STILL, "--data_url", str(photos), "--pretrained", str(tmp_path / "plain.pth")]
    words += ["--ckpt_save_dir", str(tmp_path)]
    assert train.main(words) == 0
    assert "; a new classifier of 3 classes in place of its 1000" in capsys.readouterr().out
    assert train.main([*words, "--num_classes", "1000"]) == 0
    assert "new classifier" not in capsys.readouterr().out


def test_frozen_features_stay_to_the_bit(photos, given, tmp_path):
    before, after = trained_from(given, photos, tmp_path, "--freeze", "features", "--max_lr", "0.1")
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor) == name.startswith("features."), name


def test_frozen_features_stay_to_the_bit_in_three_processes(photos, given, tmp_path):
    words = [*SMALL, "--batch_size", 3, "--epoch_size", 4, "--data_url", photos, "--pretrained", given]
    done = finish(start("train.py", *words, "--freeze", "features", "--ckpt_save_dir", tmp_path, processes=3))
    assert [one.returncode for one in done] == [0, 0, 0], done[0].stderr
    before, after = torch.load(given), torch.load(tmp_path / "last.pt")
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor) == name.startswith("features."), name


def test_averaged_weights_are_evaluated_and_validated(photos, tmp_path, capsys):
    words = [*SMALL, "--data_url", str(photos)]
    training = ["--batch_size", "8", "--epoch_size", "2", "--ema_decay", "0.5", "--ckpt_save_dir", str(tmp_path)]
    assert train.main([*words, *training]) == 0
    output = capsys.readouterr().out
    found = re.findall(r"Evaluation:\[1/2\], (model|ema): top-1 \S+ \((\d+) of 11\), top-5 100.00%, loss (\S+)", output)
    assert [name for name, _, _ in found] == ["model", "ema"]
    for name, right, loss in found:
        assert validate.main([*words, "--pretrained", str(tmp_path / "last.pt"), "--ema", str(name == "ema")]) == 0
        output = capsys.readouterr().out
        assert f"top-1: {right} of 11 right" in output
        assert f"11 pictures, loss {loss} " in output
        assert ("last.pt (the average)" in output) == (name == "ema")


def test_steps_are_logged_by_interval(photos, tmp_path):
    words = [*SMALL, "--data_url", str(photos), "--batch_size", "4", "--epoch_size", "1", "--log_every", "2"]
    assert train.main([*words, "--ckpt_save_dir", str(tmp_path), "--eval_every", "0"]) == 0
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "steps", "steps", "epoch"]
    assert [(event["epoch"], event["step"], event["steps"]) for event in events[1:3]] == [(0, 2, 2), (0, 4, 2)]
    assert set(events[1]) == {
        *("event", "unix_time_seconds", "epoch", "step", "steps"),
        *("loss_mean", "learning_rate", "seconds_per_step", "pictures_per_second"),
    }
    assert not (tmp_path / "best.pt").exists()


def test_torchrun_starts_a_killed_process_again_and_training_goes_on(photos, tmp_path):
    """The second attempt meets at the same store, in which the first has left its words."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*SMALL, "--data_url", photos, "--batch_size", 4, "--epoch_size", 12, "--save_every", 1, "--log_every", 1]
    words += ["--ckpt_save_dir", tmp_path, "--resume", "auto"]
    command = [*torchrun, "--max-restarts", "1", str(ROOT / "train.py"), *map(str, words)]
    agent = popen(command)
    log = tmp_path / "log.jsonl"
    while not (log.exists() and log.read_text().count('"steps"') > 3):
        assert agent.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    (done,) = finish([agent])
    assert done.returncode == 0, done.stderr
    assert re.search(r"goes on from .*last.pt: \d+ epochs and \d+ steps are done", done.stdout)
    assert "Epoch:[11/12]" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(data._ABSENT is not None, reason="DALI isn't installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_training_on_a_gpu_goes_on_to_the_bit(photos, tmp_path, precision):
    words = [*SMALL, "--data_url", str(photos), "--batch_size", "4", "--device", "cuda", "--precision", precision]
    words += ["--deterministic", "--ema_decay", "0.9", "--max_lr", "0.02", "--decay_epoch", "2"]
    assert train.main([*words, "--epoch_size", "2", "--ckpt_save_dir", str(tmp_path / "whole")]) == 0
    for epochs in ("1", "2"):
        cut = ["--epoch_size", epochs, "--resume", "auto", "--ckpt_save_dir", str(tmp_path / "cut")]
        assert train.main([*words, *cut]) == 0
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, cut[part][name]) for name, tensor in whole[part].items())
