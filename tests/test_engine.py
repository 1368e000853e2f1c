from __future__ import annotations

import math

import pytest
import torch
from samples import settled
from torch import nn

from mnv2 import MobileNetV2
from mnv2.data import Batch
from mnv2.distributed import World
from mnv2.engine import Evaluation, Progress, evaluate, ranks, wilson_interval
from mnv2.errors import RunError
from mnv2.logs import epoch_lines, evaluation_lines


class Table(nn.Module):
    """A network that looks the logits of a picture up by its first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits[x[:, 0, 0, 0].long()]


def batches(labels, numbers_by_batch):
    for numbers in numbers_by_batch:
        numbers = torch.tensor(numbers)
        places = numbers.clamp(min=0)
        yield Batch(places.float()[:, None, None, None].expand(-1, 3, 2, 2), labels[places], numbers)


@pytest.fixture
def table():
    return torch.randn(11, 7), torch.randint(7, (11,))


SPLITS = {
    "one-batch": [list(range(11))],
    "filled-up": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]],
    "another-order": [[7, 3, 1], [10, 0, -1], [2, 4, 5], [6, 8, 9]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_counts_are_those_of_a_written_out_evaluation(table, split):
    logits, labels = table
    result = evaluate(Table(logits), batches(labels, split), 11, World(), smooth_factor=0.1)
    best = logits.argsort(dim=1, descending=True)
    assert result.top1 == sum(int(best[i, 0] == labels[i]) for i in range(11))
    assert result.top5 == sum(int(labels[i] in best[i, :5]) for i in range(11))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1).double()
    assert result.loss == math.fsum(losses.tolist()) / 11
    assert result.pictures == 11


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([[0, 1, 2]], "of 11 pictures listed, 8 were not seen and 0 seen more than once"),
        ([list(range(11)), [3, -1]], "0 were not seen and 1 seen more than once"),
        ([], "11 were not seen"),
    ],
    ids=["missed", "repeated", "none"],
)
def test_no_accuracy_where_not_every_picture_was_seen_once(table, split, words):
    logits, labels = table
    with pytest.raises(RunError, match=words):
        evaluate(Table(logits), batches(labels, split), 11, World())


def test_ranks_agree_with_argmax_on_ties_and_put_nan_first():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[1.0, 3, 3, 2], [1.0, 3, 3, 2], [0.0, 0, 0, 0], [nan, 1, 2, 3], [1, nan, 2, 3], [nan] * 4, [inf, inf, 0, -inf]]
    )
    labels = torch.tensor([1, 2, 3, 0, 3, 2, 1])
    assert ranks(logits, labels).tolist() == [0, 1, 3, 4, 1, 4, 1]
    many = torch.randint(4, (500, 6)).float()
    true = torch.randint(6, (500,))
    assert torch.equal(ranks(many, true) == 0, many.argmax(1) == true)


def test_a_diverged_network_has_no_accuracy(table):
    logits, labels = table
    logits[4:7] = float("nan")
    with pytest.raises(RunError, match="no accuracy: the network gives NaN for 3 of 11 pictures"):
        evaluate(Table(logits), batches(labels, SPLITS["one-batch"]), 11, World())


def test_fewer_than_five_classes(table):
    logits, labels = table[0][:, :3], table[1] % 3
    assert evaluate(Table(logits), batches(labels, SPLITS["one-batch"]), 11, World()).top5 == 11


def test_evaluation_changes_nothing_in_the_network():
    model = settled(MobileNetV2(0.35, num_classes=4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = Batch(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    evaluate(model, [batch], 3, World())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wilson_interval():
    assert wilson_interval(170, 200) == pytest.approx((0.79394, 0.89286), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10)[1] == 1.0
    low, high = wilson_interval(35_937, 50_000)
    assert (low, high) == pytest.approx((0.71478, 0.72266), abs=1e-5)


def test_the_lines_are_the_references():
    progress = Progress(step=2502, seconds=872.084093, losses=[4.676] * 2502)
    assert epoch_lines(progress, 200, 0.1, 883.614453) == (
        "Epoch:[0/200], step:[2502/2502], loss:[4.676/4.676], time:872084.093, lr:0.10000\n"
        "Epoch time:883614.453, per step time:353.163, avg loss:4.676"
    )
    lines = evaluation_lines(Evaluation(49_920, 34_559, 44_287, 1.2345678, 1000.0), 0.1).splitlines()
    assert lines[-1] == "{'Top_1_Accuracy': 0.6922876602564103, 'Top_5_Accuracy': 0.8871594551282052}"
    assert lines[0] == "49920 pictures, loss 1.2346 (label smoothing 0.1), 1000.0 pictures a second"
    assert lines[1] == "top-1: 34559 of 49920 right, 69.23%, 95% interval 68.82% to 69.63%"
