from __future__ import annotations

import math

import pytest
import torch

from mnv2 import MobileNetV2
from mnv2.config import TrainConfig
from mnv2.flags import parse
from mnv2.recipe import learning_rate, make_optimizer

PIECES = "--lr_decay_mode piecewise_constant_lr"


def rates(**settings):
    config = TrainConfig(**settings)
    return [learning_rate(config, epoch) for epoch in range(config.epoch_size)]


def test_the_cosine_spans_exactly_the_epochs_asked_for():
    assert [f"{rate:.5f}" for rate in rates()[:5]] == ["0.10000", "0.09999", "0.09998", "0.09994", "0.09990"]
    assert [f"{rate:.5f}" for rate in rates(epoch_size=100)[:5]] == [
        "0.10000", "0.09998", "0.09990", "0.09978", "0.09961",
    ]  # fmt: skip
    course = rates(min_lr=0.02)
    assert course == pytest.approx([0.02 + 0.04 * (1 + math.cos(math.pi * epoch / 200)) for epoch in range(200)])


def test_the_cosine_may_fall_sooner_or_later_than_the_run_ends():
    assert rates(epoch_size=6, decay_epoch=4)[:4] == rates(epoch_size=4)
    assert rates(epoch_size=6, decay_epoch=4, min_lr=0.01)[4:] == [0.01, 0.01]
    assert rates(epoch_size=4, decay_epoch=6) == rates(epoch_size=6)[:4]


def test_warm_up_rises_to_the_rate_that_follows():
    course = rates(epoch_size=10, warmup_epochs=4)
    assert course[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert course[4:] == rates(epoch_size=6)
    pieces = {"lr_decay_mode": "piecewise_constant_lr", "milestone": (3,), "learning_rates": (0.4, 0.1)}
    assert rates(epoch_size=5, warmup_epochs=1, **pieces) == pytest.approx([0.2, 0.4, 0.4, 0.1, 0.1])


@pytest.mark.parametrize("last", [(), (0.05,)], ids=["up-to-the-last-milestone", "and-after-it"])
def test_pieces_change_at_their_milestones(last):
    pieces = {"lr_decay_mode": "piecewise_constant_lr", "milestone": (2, 5), "learning_rates": (0.2, 0.1, *last)}
    epochs = 7 if last else 5
    assert rates(epoch_size=epochs, **pieces) == ([0.2] * 2 + [0.1] * 3 + [0.05] * 2)[:epochs]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--milestone 30", "--milestone: expected none with cosine_decay_lr, got (30,)"),
        (PIECES, "--milestone: expected rising positive epochs"),
        (
            PIECES + " --milestone 60,30 --learning_rates 1,2",
            "--milestone: expected rising",
        ),
        (
            PIECES + " --milestone 3,0.5 --learning_rates 1,2",
            "--milestone: expected integers",
        ),
        (
            PIECES + " --milestone 30,60 --learning_rates 1",
            "--learning_rates: expected 2 or 3",
        ),
        (
            PIECES + " --milestone 30,60 --learning_rates 1,0",
            "--learning_rates: expected 2",
        ),
        (
            PIECES + " --milestone 30,60 --learning_rates .1,.01",
            "--learning_rates: expected a rate for the epochs from 60 to 200, got 2 for 2 milestones",
        ),
        ("--nesterov true --momentum 0", "--nesterov: expected SGD with momentum"),
        ("--nesterov --optimizer rmsprop", "--nesterov: expected SGD with momentum"),
        ("--weight_decay -1", "--weight_decay: expected a number from 0 up"),
        ("--optimizer adam", "argument --optimizer: invalid choice"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, words.split(), "")
    assert message in capsys.readouterr().err


def test_lists_of_any_length_are_read():
    words = PIECES + " --milestone 30,60 90 --learning-rates 0.1,1e-2,0.001 0.0001"
    config = parse(TrainConfig, words.split(), "")
    assert config.milestone == (30, 60, 90)
    assert config.learning_rates == (0.1, 0.01, 0.001, 0.0001)


def test_weight_decay_leaves_norms_and_biases_alone():
    model = MobileNetV2(0.35, 4)
    model.features[0].requires_grad_(False)
    optimizer = make_optimizer(model, TrainConfig(weight_decay=4e-5))
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [4e-5, 0.0]
    for name, parameter in model.named_parameters():
        if name.startswith("features.0."):
            assert id(parameter) not in decayed | free
        else:
            assert (id(parameter) in decayed) == (parameter.dim() > 1), name
            assert (id(parameter) in free) == (parameter.dim() <= 1), name


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "rmsprop"])
def test_steps_follow_the_formula(optimizer):
    """Three steps on fixed gradients, against the update written out in fp64."""
    model = torch.nn.Linear(3, 2).double()
    name = "rmsprop" if optimizer == "rmsprop" else "sgd"
    config = TrainConfig(optimizer=name, nesterov=optimizer == "nesterov", max_lr=0.1, weight_decay=0.01)
    chosen = make_optimizer(model, config)
    expected = {key: p.detach().clone() for key, p in model.named_parameters()}
    buffer = {key: torch.zeros_like(p) for key, p in expected.items()}
    square = {key: torch.zeros_like(p) for key, p in expected.items()}
    for _ in range(3):
        for key, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad + (0.01 * expected[key] if key == "weight" else 0)
            if optimizer == "rmsprop":
                square[key] = 0.9 * square[key] + 0.1 * gradient**2
                gradient = gradient / (square[key].sqrt() + math.sqrt(1e-3))
            buffer[key] = 0.9 * buffer[key] + gradient
            expected[key] -= 0.1 * (gradient + 0.9 * buffer[key] if optimizer == "nesterov" else buffer[key])
        chosen.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key])
