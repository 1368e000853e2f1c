from __future__ import annotations

import re

import pytest
import torch
from processes import finish, start
from samples import save_weights, settled, steady

import validate
from mnv2 import MobileNetV2
from mnv2.engine import Evaluation
from mnv2.errors import InputError
from mnv2.model import VARIANTS
from mnv2.sweep import Row, table, variants

NAMES = ["0.35_32", "0.5_48", "1.0_192"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of two variants."""
    place = tmp_path_factory.mktemp("weights")
    for alpha, resize in ((0.35, 32), (0.5, 48)):
        torch.manual_seed(0)
        model = settled(MobileNetV2(alpha, num_classes=3))
        save_weights(place / f"mobilenetv2_{alpha}_{resize}.safetensors", model, ["ant", "bee", "cat"], resize=32)
    return place


def rows(output):
    lines = output.splitlines()
    return [line.split() for line in lines[next(i for i, line in enumerate(lines) if line.startswith("variant")) :]]


def test_variants_stand_beside_what_was_published(photos, folder, capsys):
    words = ["--data_url", photos, "--weights_dir", folder, "--sweep", *NAMES]
    assert validate.main(list(map(str, words))) == 1
    output = capsys.readouterr()
    assert output.err == "validate.py: --sweep: expected weights that fit of every variant named, got none of 1.0_192\n"
    assert output.out.count("val: 11 pictures") == 1  # which are looked at once
    assert "no weights of alpha 1.0 at 192 px" in output.out
    assert "mobilenetv2_0.5_48.safetensors was trained with 32" in output.out
    heading, small, large, none = rows(output.out)
    assert heading == [
        "variant",
        "top-1",
        "top-5",
        "pictures",
        "Google",
        "MindSpore",
        "d-li14",
        "this",
        "file",
        "weights",
    ]
    assert none == ["1.0_192", "70.7", "71.3", "71.1", "none"]

    for name, row in (("0.35_32", small), ("0.5_48", large)):
        alpha, resize = name.split("_")
        one = ["--data_url", photos, "--weights_dir", folder, "--alpha", alpha, "--resize", resize]
        assert validate.main(list(map(str, one))) == 0
        alone = capsys.readouterr().out
        assert f"top-1: {round(float(row[1]) * 11 / 100)} of 11 right" in alone
        assert row[0] == name
        assert row[2:4] == ["100.00", "11"]
        assert row[-1].endswith(f"mobilenetv2_{name}.safetensors")

    done, other = finish(start("validate.py", *words, processes=2))
    assert (done.returncode, other.returncode) == (1, 1)
    assert steady(done.stdout) == steady(output.out)


def test_a_sweep_of_all_does_with_what_there_is(photos, tmp_path, capsys):
    words = ["--data_url", str(photos), "--weights_dir", str(tmp_path), "--batch_size", "4", "--sweep"]
    assert validate.main(words) == 1
    output = capsys.readouterr()
    assert output.err == "validate.py: --sweep: expected weights that fit of one variant at least, got none\n"
    assert len(rows(output.out)) == 1 + sum(map(len, VARIANTS.values()))

    save_weights(tmp_path / "mobilenetv2_0.35_96.safetensors", settled(MobileNetV2(0.35, 3)), ["ant", "bee", "cat"])
    assert validate.main(words) == 0
    found = [row for row in rows(capsys.readouterr().out) if row[-1].endswith("safetensors")]
    assert [row[0] for row in found] == ["0.35_96"]


@pytest.mark.parametrize("word", ["0.75", "0.75x192", "_192", "0.75_", "0.75_192_1"])
def test_a_variant_is_a_width_and_a_resolution(word):
    assert variants(["0.75_192,1.0_96", "1.1_200"]) == [(0.75, 192), (1.0, 96), (1.1, 200)]
    with pytest.raises(InputError, match=f"--sweep: expected variants such as 0.75_192, got {word}"):
        variants([word])


@pytest.mark.parametrize(
    "words", [["--results", "x.csv"], ["--per_class"], ["--expect", "0.5"], ["--pretrained", "False"]]
)
def test_what_is_of_one_evaluation_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        validate.main(["--sweep", *words])
    assert re.search(f"{words[0]}: expected (none|weights) with --sweep", capsys.readouterr().err)


def test_the_table_has_percents():
    line = table([Row(1.3, 224, None, Evaluation(1000, 744, 921, 1.0, 1.0))]).splitlines()[1]
    assert line.split() == ["1.3_224", "74.40", "92.10", "1000", "74.4", "74.7", "none"]
