"""The scripts as users run them: in one process, under torchrun, and with everything that can be given wrongly."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import photo, settled, write_photos

import train
import validate
from mnv2 import MobileNetV2, checkpoint
from mnv2.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--alpha", "0.35", "--resize", "32"]


def run(script: str, *words: object, processes: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def steady(output: str) -> list[str]:
    """The lines of an evaluation without its speed."""
    return [re.sub(r", [\d.]+ pictures a second", "", line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint that tells the three classes of the photographs apart at random."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "last.pt"
    model = settled(MobileNetV2(0.35, num_classes=3))
    checkpoint.save(str(path), model, config=TrainConfig(), classes=["ant", "bee", "cat"], epoch=0)
    return path


def test_the_result_is_the_same_for_any_number_of_processes(photos, weights, capsys):
    """Eleven pictures; with eight processes some have one and some two, with batches of 4 all tails differ."""
    words = [*SMALL, "--data_url", photos, "--pretrained", weights, "--batch_size", 4]
    assert validate.main(list(map(str, words))) == 0
    expected = steady(capsys.readouterr().out)[-4:]
    assert expected[0].startswith("11 pictures, loss ")
    for processes in (2, 3, 8):
        done = run("validate.py", *words, processes=processes)
        assert done.returncode == 0, done.stderr
        assert steady(done.stdout)[-4:] == expected, processes
    for batch_size in (1, 11, 64):
        assert validate.main([*map(str, words[:-1]), str(batch_size)]) == 0
        assert steady(capsys.readouterr().out)[-3:] == expected[-3:]


def test_more_processes_than_pictures(tmp_path, weights):
    write_photos(tmp_path / "val", 2)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir()
    done = run("validate.py", *SMALL, "--data_url", tmp_path, "--pretrained", weights, processes=3)
    assert done.returncode == 0, done.stderr
    assert "2 pictures, loss" in done.stdout
    assert set(ast.literal_eval(done.stdout.splitlines()[-1])) == {"Top_1_Accuracy", "Top_5_Accuracy"}


def test_training_prints_the_references_lines_and_saves(photos, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    words = [*SMALL, "--data_url", photos, "--epoch_size", 2, "--batch_size", 8, "--ckpt_save_dir", folder]
    assert train.main(list(map(str, words))) == 0
    lines = capsys.readouterr().out.splitlines()
    for epoch, lr in enumerate(("0.10000", "0.05000")):
        first, second = [i for i, line in enumerate(lines) if line.startswith("Epoch")][2 * epoch : 2 * epoch + 2]
        pattern = rf"Epoch:\[{epoch}/2\], step:\[2/2\], loss:\[\d+\.\d{{3}}/\d+\.\d{{3}}\], time:\d+\.\d{{3}}, lr:{lr}"
        assert re.fullmatch(pattern, lines[first])
        pattern = r"Epoch time:\d+\.\d{3}, per step time:\d+\.\d{3}, avg loss:\d+\.\d{3}"
        assert re.fullmatch(pattern, lines[second])
    content = torch.load(folder / "last.pt", weights_only=True)
    assert content["classes"] == ["ant", "bee", "cat"]
    assert content["epoch"] == 2

    assert validate.main([*SMALL, "--data_url", str(photos), "--pretrained", str(folder / "last.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("11 pictures, loss")
    assert "class numbers: the weights' own record" in lines


def test_two_processes_train_one_network(photos, tmp_path):
    words = [*SMALL, "--data_url", photos, "--epoch_size", 2, "--batch_size", 5, "--max_lr", 0.01]
    done = run("train.py", *words, "--ckpt_save_dir", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "step:[2/2]" in done.stdout
    assert done.stdout.count("Epoch:[0/2]") == 1
    assert os.listdir(tmp_path) == ["last.pt"]


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
        ("validate.py", "--data_url {photos}", r"--pretrained: no weights at .*mobilenetv2_1.0_224.safetensors"),
        ("validate.py", "--data_url {photos} --pretrained no.pth", "--pretrained: can't read no.pth: No such file"),
        ("validate.py", "--data_url {photos} --pretrained {weights}", "--pretrained: .* network with --alpha 1.0"),
        ("validate.py", "--data_url {photos} --pretrained False --num_classes 2", "--num_classes: expected at least 3"),
        ("train.py", "--data_url {photos} --batch_size 24", "--batch_size: expected at most 23 for 23 pictures"),
        ("train.py", "--data_url {photos} --class_index imagenet", "--class_index: ImageNet-1k's own order"),
        ("train.py", "--data_url {photos} --class_index no.txt", "--class_index: can't read no.txt"),
        ("train.py", "--synthetic 64 --alpha 0.35 --resize 32 --max_lr 1e30 --epoch_size 9", "the loss of step .* is"),
        ("train.py", "--synthetic --resize 32 --batch_size 1", "--batch_size: expected 2 or more at --resize 32"),
        ("train.py", "--synthetic --ckpt_save_dir /dev/null/x", "--ckpt_save_dir: can't write to /dev/null/x: Not a"),
        ("train.py", "--data_url {photos} --device cuda", "--device: expected a CUDA GPU"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(photos, weights, tmp_path, monkeypatch, capfd, script, words, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("torch sees a CUDA GPU here, so asking for one is no mistake")
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path))
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
    done = run("validate.py", *words, processes=2)
    if bad_files == "error":
        assert done.returncode != 0
        assert f"{paths[3]} is empty; {paths[4]} is a truncated JPEG" in done.stderr
        assert "Accuracy" not in done.stdout
    else:
        assert done.returncode == 0, done.stderr
        assert f"left out: {paths[3]} is empty\nleft out: {paths[4]} is a truncated JPEG\n" in done.stdout
        assert "9 pictures, loss" in done.stdout


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_launchers_variable_that_is_no_number(variable):
    done = run("train.py", "--synthetic", **{variable: "one"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"train.py: {variable}: expected an integer in the environment, got 'one'"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 processes are announced, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE: 2 processes are announced, but MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "RANK: expected 0 to 1 for a WORLD_SIZE of 2, got 2",
        ),
    ],
    ids=["no-rank", "no-address", "rank-too-high"],
)
def test_half_a_launchers_variables(environment, words):
    done = run("train.py", "--synthetic", **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"train.py: {words}")


def test_an_interrupt_is_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "train.py", *SMALL, "--synthetic", "64", "--ckpt_save_dir", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("Epoch:"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == "train.py: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("processes", [1, 2, 3])
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
