from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from kernels import measured
from mnv2.config import TrainConfig, ValidateConfig, check_backend
from mnv2.errors import InputError
from mnv2.flags import parse
from mnv2.pretrained import follow


def train(*words: str) -> TrainConfig:
    return parse(TrainConfig, words, "Train.")


def test_the_defaults_are_the_references_recipe():
    assert train() == TrainConfig()
    config = follow(train(), None)
    expected = {
        "arch": "mobilenetv2", "alpha": 1.0, "resize": 224, "epoch_size": 200, "batch_size": 64, "max_lr": 0.1,
        "min_lr": 0.0, "momentum": 0.9, "smooth_factor": 0.1, "num_parallel_workers": 8, "pretrained": False,
        "ckpt_save_dir": "./mobilenet_v2", "data_url": "./dataset/imagenet", "crop_scale": (0.08, 1.0), "hflip": 0.5,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert parse(ValidateConfig, [], "").pretrained is True


def test_what_users_type():
    words = "--arch mobilenetv2 --alpha 0.75 --resize 192 --pretrained True --data_url ./dataset/x"
    config = train(*words.split())
    assert (config.alpha, config.resize, config.pretrained, config.data_url) == (0.75, 192, True, "./dataset/x")


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("false", False), ("1", True), ("0", False), ("YES", True), ("no", False), ("w.pth", "w.pth")],
)
def test_pretrained_is_a_boolean_or_a_file(text, value):
    for words in (["--pretrained", text], [f"--pretrained={text}"]):
        pretrained = train(*words).pretrained
        assert pretrained == value
        assert type(pretrained) is type(value)


def test_underscores_and_hyphens_are_the_same():
    config = train("--data-url", "some-folder_of-mine", "--crop-scale=0.5,1", "--warmup-epochs=2")
    assert (config.data_url, config.crop_scale, config.warmup_epochs) == ("some-folder_of-mine", (0.5, 1.0), 2)


@pytest.mark.parametrize("words", [["0.2", "0.8"], ["0.2,0.8"], ["0.2,", "0.8"]], ids=str)
def test_lists_take_commas_and_spaces(words):
    assert train("--crop_scale", *words).crop_scale == (0.2, 0.8)


def test_a_flag_without_its_value():
    assert train("--synthetic").synthetic == 1024
    assert train("--synthetic", "77").synthetic == 77
    assert train("--pretrained").pretrained is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--alpa 1", "unrecognized arguments: --alpa 1"),
        ("--alph 1", "unrecognized arguments"),
        ("--alpha wide", "argument --alpha: invalid float value: 'wide'"),
        ("--alpha -1", "--alpha: expected a positive number .*, got -1.0"),
        ("--alpha nan", "--alpha: expected a positive number"),
        ("--arch resnet50", "argument --arch: invalid choice: 'resnet50'"),
        ("--resize 0", "--resize: expected an integer from 1 to 8192, got 0"),
        ("--resize 224.5", "argument --resize: invalid int value"),
        ("--batch_size 0", "--batch_size: expected an integer from 1 to 65536, got 0"),
        ("--num_classes 0", "--num_classes: expected an integer from 1 to 1000000, got 0"),
        ("--smooth_factor 1", "--smooth_factor: expected a number from 0 up to, but not, 1, got 1.0"),
        ("--epoch_size 0", "--epoch_size: expected a positive integer, got 0"),
        ("--max_lr nan", "--max_lr: expected a positive number"),
        ("--min_lr 0.2", "--min_lr: expected a number from 0 to max_lr 0.1, got 0.2"),
        (
            "--epoch_size 5 --warmup_epochs 5",
            "--warmup_epochs: expected an integer from 0 up to, but not, epoch_size 5",
        ),
        ("--crop_scale 0.5", "--crop_scale: expected two numbers, got 0.5"),
        ("--crop_scale 0.8 0.5", "--crop_scale: expected two rising numbers"),
        ("--crop_scale 0.5 nan", "--crop_scale: expected two rising numbers"),
        ("--crop_ratio a b", "--crop_ratio: expected two numbers, got a b"),
        ("--crop_ratio 1,inf", "--crop_ratio: expected two rising positive numbers"),
        ("--max_lr inf", "--max_lr: expected a positive number, got inf"),
        ("--norm_eps 0", "--norm_eps: expected a number over 0"),
        ("--backend cudnn", "argument --backend: invalid choice: 'cudnn'"),
        ("--ckpt_save_dir=", "--ckpt_save_dir: expected some text, got nothing"),
        ("--data_url=", "--data_url: expected some text, got nothing"),
        ("--batch_size 1000000000000", "--batch_size: expected an integer from 1 to 65536"),
        ("--alpha 1e5", "--alpha: expected at most 100"),
        ("--hflip 1.5", "--hflip: expected a probability, got 1.5"),
        ("--bad_files ignore", "argument --bad_files: invalid choice"),
        ("--seed -1", "--seed: expected an integer from 0"),
        ("--grad_accum_steps 0", "--grad_accum_steps: expected a positive integer, got 0"),
        ("--repeat_num 0", "--repeat_num: expected a positive integer, got 0"),
        ("--log_every 0", "--log_every: expected a positive integer, got 0"),
        ("--keep_checkpoint_max -1", "--keep_checkpoint_max: expected an integer from 0 up, got -1"),
        ("--save_every -1", "--save_every: expected an integer from 0 up, got -1"),
        ("--decay_epoch 2 --warmup_epochs 2", "--decay_epoch: expected an integer over warmup_epochs 2, got 2"),
        ("--clip_grad_norm nan", "--clip_grad_norm: expected a number from 0 up, got nan"),
        ("--ema_decay 1", "--ema_decay: expected a number from 0 up to, but not, 1, got 1.0"),
        ("--precision fp8", "argument --precision: invalid choice: 'fp8'"),
        ("--freeze all", "argument --freeze: invalid choice: 'all'"),
        ("--max_lr 1e31", "--max_lr: expected a positive number"),
        ("--run_distribute maybe", "argument --run_distribute: expected true or false, got 'maybe'"),
    ],
)
def test_a_wrong_flag_ends_with_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train(*words.split())
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(message, printed)


def test_a_wrong_field_is_refused_in_code_too():
    with pytest.raises(InputError, match="--bad_files: expected error or skip, got ignore"):
        TrainConfig(bad_files="ignore")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().alpha = 2.0


@pytest.mark.parametrize("config", [TrainConfig, ValidateConfig])
def test_help_describes_every_flag(config, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(config, ["--help"], "Words.")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        assert f"--{field.name}" in text
        assert field.metadata["help"]


def test_the_references_flags_are_known():
    words = (
        "--data_url x --epoch_size 3 --pretrained False --keep_checkpoint_max 4 --ckpt_save_dir y "
        "--num_parallel_workers 2 --batch_size 8 --repeat_num 2 --num_classes 1001 --lr_decay_mode cosine_decay_lr "
        "--min_lr 0.01 --max_lr 0.2 --decay_epoch 9 --momentum 0.8 --smooth_factor 0.2 --run_distribute no "
        "--alpha 0.5 --resize 96"
    )
    config = train(*words.split())
    assert (config.keep_checkpoint_max, config.repeat_num, config.decay_epoch) == (4, 2, 9)
    assert (config.num_classes, config.run_distribute) == (1001, False)


@pytest.mark.parametrize(
    ("words", "resume"), [("", None), ("--resume", "auto"), ("--resume last.pt", "last.pt"), ("--resume no", None)]
)
def test_resume_is_auto_or_a_file(words, resume):
    assert train(*words.split()).resume == resume


def test_no_more_threads_than_cores():
    assert 1 <= TrainConfig(num_parallel_workers=10_000).threads < 10_000
    assert TrainConfig(num_parallel_workers=1).threads == 1


def test_tables_that_cannot_be_read_are_one_line_before_a_gpu_runs_by_them(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "TABLES", tmp_path / "measured.json")
    check_backend("auto", torch.device("cuda"))
    measured.TABLES.write_text("{")
    with pytest.raises(InputError, match=r"measured\.json: expected what `python -m bench\.tune` writes"):
        check_backend("auto", torch.device("cuda"))
    for backend, device in (("torch", "cuda"), ("auto", "cpu")):
        check_backend(backend, torch.device(device))
