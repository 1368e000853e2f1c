"""What `validate.py` says of each picture and class, and what tells two evaluations apart."""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from processes import finish, start
from samples import save_weights, settled
from torch import nn

import validate
from mnv2 import MobileNetV2, compare
from mnv2.compare import Outcomes, largest_change, mcnemar, paired_interval
from mnv2.config import ValidateConfig
from mnv2.data import Batch
from mnv2.distributed import World
from mnv2.engine import Evaluation, evaluate, ranks
from mnv2.errors import InputError, RunError
from mnv2.files import list_pictures
from mnv2.labels import imagenet_classes
from mnv2.predictions import Prediction, Predictions, by_imagenets_numbers, first_classes, read, write

SMALL = ["--alpha", "0.35", "--resize", "32", "--batch_size", "4"]
HEADING = "path,label,top1,top2,p1,p2\n"


def exact(b: int, c: int) -> float:
    """The test in whole numbers, each binomial coefficient from the one before."""
    n, term, tail = b + c, 1, 1
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def test_mcnemars_test_is_exact():
    assert mcnemar(5, 15) == pytest.approx(0.04138947, rel=1e-6)
    assert mcnemar(0, 0) == mcnemar(7, 7) == mcnemar(0, 1) == 1.0
    pairs = [(b, c) for b in range(12) for c in range(12)]
    for b, c in [*pairs, (120, 160), (2000, 2300)]:
        assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(exact(b, c), rel=1e-11)


def test_mcnemars_test_of_large_counts_neither_overflows_nor_fails():
    b, c = 10**7, 10**7 + 9000
    assert mcnemar(b, c) == pytest.approx(math.erfc((c - b - 1) / math.sqrt(2 * (b + c))), rel=1e-3)
    assert mcnemar(0, 10**7) == 0.0
    assert mcnemar(10**7, 10**7) == 1.0


@pytest.mark.parametrize(
    ("outcomes", "interval"),
    [
        (Outcomes(1, 7, 1, 12), (-0.507, -0.026)),  # Fagerland et al. 2014, BMC Med. Res. Methodol. 14:133
        (Outcomes(14, 0, 5, 22), (0.011, 0.226)),  # Altman et al. 2000, Statistics with Confidence, table 6.2
    ],
    ids=["no correlation left", "correlated"],
)
def test_the_interval_is_the_published_one(outcomes, interval):
    assert paired_interval(outcomes) == pytest.approx(interval, abs=5e-4)


@pytest.mark.parametrize("cells", [(36000, 900, 1000, 12100), (3, 9, 4, 2), (1, 0, 0, 0), (0, 0, 5, 0), (0, 0, 0, 4)])
def test_the_interval_holds_the_difference_and_turns_with_it(cells):
    both, a_alone, b_alone, neither = cells
    low, high = paired_interval(Outcomes(*cells))
    assert -1 <= low <= (b_alone - a_alone) / sum(cells) <= high <= 1
    assert paired_interval(Outcomes(both, b_alone, a_alone, neither)) == pytest.approx((-high, -low), abs=1e-15)


def test_the_interval_of_many_pictures_is_the_normal_one():
    outcomes = Outcomes(36000, 900, 1000, 12100)
    half = 1.959964 * math.sqrt(1900 - 100**2 / 50_000) / 50_000
    assert paired_interval(outcomes) == pytest.approx((0.002 - half, 0.002 + half), abs=2e-5)


def test_the_classes_put_first_agree_with_the_ranks():
    logits = torch.randint(4, (300, 7)).float()
    classes, probabilities = first_classes(logits, 5)
    assert torch.equal(probabilities, logits.softmax(1).gather(1, classes))
    for label in range(7):
        place = ranks(logits, torch.full((300,), label))
        found = (classes == label).int()
        assert torch.equal(found.sum(1), (place < 5).int())
        assert torch.equal(found.argmax(1)[place < 5], place[place < 5])


def test_evaluation_keeps_each_pictures_predictions_in_the_order_of_the_listing():
    logits, labels = torch.randn(7, 3), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    batches = []
    for numbers in ([6, 2, 0], [5, 1, -1], [3, 4, -1]):
        places = torch.tensor(numbers).clamp(min=0)
        batches.append(Batch(logits[places], labels[places], torch.tensor(numbers)))
    result = evaluate(nn.Identity(), batches, 7, World(), keep=3)
    kept = result.predictions
    assert torch.equal(kept.labels, labels)
    assert torch.equal(kept.classes, logits.argsort(1, descending=True))
    assert torch.equal(kept.probabilities.float(), logits.softmax(1).sort(1, descending=True).values)
    assert result.top1 == int((kept.classes[:, 0] == labels).sum())
    assert evaluate(nn.Identity(), batches, 7, World()).predictions is None


def test_classes_come_worst_first():
    labels = torch.tensor([4, 4, 0, 0, 2, 2, 2, 6])
    first = torch.tensor([4, 0, 0, 4, 2, 2, 2, 1])
    predictions = Predictions(labels, first[:, None], torch.ones(8, 1))
    assert predictions.by_class() == [(6, 1, 0), (0, 2, 1), (4, 2, 1), (2, 3, 3)]


def test_what_is_written_is_read_to_the_last_bit(tmp_path, monkeypatch):
    probabilities = torch.rand(3, 2)
    predictions = Predictions(torch.tensor([2, 0, 1]), torch.tensor([[0, 1], [2, 1], [1, 0]]), probabilities)
    path, names = str(tmp_path / "a.csv"), ['n01/a, "b".jpg', "n01/ü.jpg", "n02/c.jpg"]
    write(path, names, predictions)
    rows = read(path)
    assert list(rows) == names
    assert [(row.label, *row.classes) for row in rows.values()] == [(2, 0, 1), (0, 2, 1), (1, 1, 0)]
    assert torch.equal(torch.tensor([row.probabilities for row in rows.values()]), probabilities)

    def full(*_):
        raise OSError(28, "No space left on device")

    before = (tmp_path / "a.csv").read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"can't write .*a.csv: .*No space left"):
        write(path, names[::-1], predictions)
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected results of validate.py"),
        ("path,label,top1,p1,p2\na,0,0,1,1\n", "expected results of validate.py"),
        (HEADING, "expected pictures, got none"),
        (HEADING + "a,0,0,1,0.5\n", "expected 6 columns in line 2, got 5"),
        (HEADING + "a,0,0,1,0.5,x\n", "line 2: expected numbers, but could not convert string to float: 'x'"),
        (HEADING + "a,0,0,1,0.5,nan\n", "line 2: expected probabilities from 0 to 1, got 0.5, nan"),
        (HEADING + "a,0,0,1,1,0\nb,0,0,1,1,0\na,0,0,1,1,0\n", "each picture once, got a again in line 4"),
    ],
    ids=["empty", "heading", "no pictures", "columns", "a word", "NaN", "twice"],
)
def test_a_file_that_is_no_such_file_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "a.csv").write_text(text)
    assert compare.main([str(tmp_path / "a.csv")] * 2) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(f"mnv2.compare: {tmp_path}/a.csv: .*{re.escape(words)}.*\n", errors)


def test_other_pictures_or_labels_are_named():
    one = Prediction(0, (0,), (1.0,))
    with pytest.raises(InputError, match=r"but b is in B and not in A \(2 such pictures\)"):
        compare.match({"a": one}, {"a": one, "b": one, "c": one}, ("A", "B"))
    with pytest.raises(InputError, match="but b is in A and not in B"):
        compare.match({"a": one, "b": one}, {"a": one}, ("A", "B"))
    with pytest.raises(InputError, match="same labels in both, but a has 0 in A and 3 in B"):
        compare.match({"a": one}, {"a": one._replace(label=3)}, ("A", "B"))


def test_the_largest_change_is_bounded_where_a_class_is_not_listed():
    pairs = {
        "a": (Prediction(0, (0, 1), (0.625, 0.375)), Prediction(0, (1, 0), (0.5, 0.5))),
        "b": (Prediction(0, (5, 6), (0.9, 0.05)), Prediction(0, (7, 8), (0.5, 0.2))),
    }
    assert largest_change(pairs) == (pytest.approx(0.9 - 0.2), "b", 5, True)
    assert largest_change({"a": pairs["a"]}) == (0.125, "a", 0, False)


def test_the_comparison(tmp_path, capsys):
    """Ten pictures: A has 3 alone, B 1, both 4; those of B are in another order."""
    firsts = [(0, 0)] * 4 + [(0, 1)] * 3 + [(1, 0)] + [(1, 1)] * 2
    rows = [(f"v/{number}.jpg,0,{a},{1 - a},0.75,0.25", f"v/{number}.jpg,0,{b},{1 - b},0.75,0.25")
            for number, (a, b) in enumerate(firsts)]  # fmt: skip
    for name, lines in zip("ab", zip(*rows, strict=True), strict=True):
        (tmp_path / name).write_text(HEADING + "\n".join(lines[:: 1 if name == "a" else -1]) + "\n")
    words = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert compare.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 pictures"
    assert lines[2] == "   top-1: 7 right, 70.00%, 95% interval 39.68% to 89.22%"
    assert lines[5] == "   top-1: 5 right, 50.00%, 95% interval 23.66% to 76.34%"
    assert lines[7] == "both right 4, A alone 3, B alone 1, neither 2; predictions differ for 4"
    assert lines[8].startswith("B - A: -20.00 points of top-1, 95% interval -")
    assert lines[9] == "McNemar's exact test, two-sided: p = 0.625"
    assert lines[10:] == ["largest change of a probability: 0.5, of class 0 for v/4.jpg"]
    assert compare.main([*words, "--list"]) == 0
    flips = capsys.readouterr().out.splitlines()[11:]
    assert flips[0] == "A alone: v/4.jpg, class 0, A says 0 (0.750), B 1 (0.750)"
    assert [line[:16] for line in flips] == [f"A alone: v/{i}.jpg"[:16] for i in (4, 5, 6)] + ["B alone: v/7.jpg"]


@pytest.mark.parametrize(
    ("expect", "tolerance", "fine"),
    [(0.7187, 0.0, True), (0.7188, 0.0, False), (0.7197, 0.001, True), (0.7177, 0.001, True), (0.7198, 0.001, False)],
)
def test_an_accuracy_is_expected_in_decimal(expect, tolerance, fine):
    config = ValidateConfig(expect=expect, tolerance=tolerance)
    result = Evaluation(50_000, 35_935, 45_000, 1.0, 1.0)
    if fine:
        validate.check_accuracy(config, result)
    else:
        with pytest.raises(RunError, match=r"--expect: top-1 is 0.7187 \(35935 of 50000\), expected 0.71.8 to within"):
            validate.check_accuracy(config, result)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"expect": 71.87}, "--expect: expected a share from 0 to 1, got 71.87"),
        ({"tolerance": float("nan")}, "--tolerance: expected a share from 0 to 1, got nan"),
        ({"results": ""}, "--results: expected some text, got nothing"),
        ({"results": "a.csv", "synthetic": 8}, "--results: expected none with --synthetic"),
        ({"per_class": True, "synthetic": 8}, "--per_class: expected none with --synthetic"),
    ],
)
def test_flags_that_can_not_be_are_refused(flags, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ValidateConfig(**flags)


@pytest.mark.parametrize(("place", "words"), [("no/a.csv", "can't write to .*/no: No such"), ("", "expected a file")])
def test_a_place_that_can_not_be_written_is_refused_first(photos, tmp_path, capsys, place, words):
    place = str(tmp_path / place)
    assert validate.main([*SMALL, "--data_url", str(photos), "--pretrained", "False", "--results", place]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(f"validate.py: --results: {words}.*\n", errors)


def test_results_are_the_same_bytes_for_one_process_and_two(photos, tmp_path, capsys):
    weights, alone, together = (tmp_path / name for name in ("last.pt", "alone.csv", "together.csv"))
    save_weights(weights, settled(MobileNetV2(0.35, num_classes=3)), ["cat", "ant", "bee"])
    words = [*SMALL, "--data_url", str(photos), "--pretrained", str(weights)]
    assert validate.main([*words, "--per_class", "--results", str(alone)]) == 0
    lines = capsys.readouterr().out.splitlines()
    done, other = finish(start("validate.py", *words, "--results", together, "--expect", "1", processes=2))
    assert (done.returncode, other.returncode, other.stderr) == (1, 0, ""), done.stderr + other.stderr
    assert re.fullmatch(r"validate.py: --expect: top-1 is 0\.\d+ \(\d of 11\), expected 1 to within 0\n", done.stderr)
    assert done.stdout.splitlines()[-1] == lines[-1]
    assert alone.read_bytes() == together.read_bytes()

    pictures = list_pictures(str(photos), "val")
    rows = read(str(alone))
    assert list(rows) == pictures.paths_below()
    assert [row.label for row in rows.values()] == [["cat", "ant", "bee"].index(name) for name in pictures.names]
    assert all(sorted(row.classes) == [0, 1, 2] for row in rows.values())
    assert all(sum(row.probabilities) == pytest.approx(1) for row in rows.values())

    right = sum(row.right for row in rows.values())
    assert lines[-1] == str({"Top_1_Accuracy": right / 11, "Top_5_Accuracy": 1.0})
    assert lines[-5].split() == ["class", "pictures", "right", "top-1"]
    table = [line.split() for line in lines[-4:-1]]
    assert sorted(row[:2] for row in table) == [["ant", "4"], ["bee", "4"], ["cat", "3"]]
    assert sum(int(row[2]) for row in table) == right
    shares = [float(row[3].rstrip("%")) for row in table]
    assert shares == sorted(shares)


def test_networks_with_a_background_are_compared_by_imagenets_numbers():
    predictions = Predictions(torch.tensor([1, 1000]), torch.tensor([[1, 0], [1000, 5]]), torch.ones(2, 2))
    background_first = ["background", *(identifier for identifier, _ in imagenet_classes())]
    found = by_imagenets_numbers(predictions, background_first)
    assert (found.labels.tolist(), found.classes.tolist()) == ([0, 999], [[0, 1000], [999, 4]])
    assert by_imagenets_numbers(predictions, background_first[1:]) is predictions


def test_another_numbering_than_the_weights_is_told(photos, weights, capsys):
    words = [*SMALL, "--data_url", photos, "--pretrained", weights, "--class_index"]
    (index := weights.parent / "index.txt").write_text("bee\nant\ncat\n")
    assert validate.main([*map(str, words), str(index)]) == 0
    assert "--class_index: bee is 0 here, and 1 for the weights: mind the accuracy" in capsys.readouterr().out
    assert validate.main([*map(str, words), "auto"]) == 0
    assert "for the weights" not in capsys.readouterr().out


def test_results_do_not_replace_the_weights(photos, weights, capsys):
    before = weights.read_bytes()
    words = [*SMALL, "--data_url", photos, "--pretrained", weights, "--results", weights]
    assert validate.main(list(map(str, words))) == 1
    assert f"--results: expected another file than the weights' own, got {weights}" in capsys.readouterr().err
    assert weights.read_bytes() == before
