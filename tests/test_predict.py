from __future__ import annotations

import ast
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from samples import CLASSES, SMALL, photo, save_weights, write_photos, write_undecodable

from mnv2 import MobileNetV2, caption, files, predict
from mnv2.data import Loader, profile
from mnv2.distributed import World
from mnv2.engine import evaluate
from mnv2.fold import fold
from mnv2.labels import class_names


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("pictures"), 7)


def run(*words) -> int:
    return predict.main([*SMALL, *map(str, words)])


def told(capsys) -> dict[str, list[dict]]:
    """Classes by path, of ``--json``."""
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return {line["path"]: line["classes"] for line in lines}


def about(path: Path) -> str:
    """What stderr says of a checkpoint's weights."""
    usual = "padding symmetric, norm_eps 1e-05, preprocessing torchvision"
    return f"weights: {path}, from mnv2, where it's usual: {usual}\n"


def probabilities(model, pictures) -> list[list[float]]:
    """What the network that validate.py evaluates gives for batches of the evaluation's loader."""
    loader = Loader(list(map(str, pictures)), [0] * len(pictures), profile("tf", 32), batch_size=3, world=World())
    with torch.inference_mode():
        network = fold(model)
        return torch.cat([network(b.images)[b.numbers >= 0] for b in loader]).softmax(1).tolist()


def test_pictures_get_what_the_evaluations_network_gives_them(model, weights, pictures, capsys):
    words = ["--pretrained", weights, "--preprocessing", "tf", "--batch_size", 3, "--json"]
    assert run(*pictures, *words) == 0
    found = told(capsys)
    assert list(found) == list(map(str, pictures))
    for classes, expected in zip(found.values(), probabilities(model, pictures), strict=True):
        order = sorted(range(3), key=lambda number: -expected[number])
        assert [one["class"] for one in classes] == order
        assert [one["name"] for one in classes] == [CLASSES[number] for number in order]
        assert [one["probability"] for one in classes] == pytest.approx([expected[n] for n in order], rel=1e-4)


def test_the_same_are_right_as_in_an_evaluation(model, weights, pictures, capsys):
    labels = [CLASSES.index(path.parent.name) for path in pictures]
    loader = Loader(list(map(str, pictures)), labels, profile("torchvision", 32), batch_size=4, world=World())
    right = evaluate(fold(model), loader, len(pictures), World()).top1
    assert run(*pictures, "--pretrained", weights, "--topk", 1, "--json") == 0
    assert sum(Path(path).parent.name == classes[0]["name"] for path, classes in told(capsys).items()) == right


def test_the_text_has_path_classes_and_the_best_of_them(weights, pictures, capsys):
    assert run(pictures[0], "--pretrained", weights, "--topk", 2) == 0
    path, first, second, best = capsys.readouterr().out.splitlines()
    assert path == str(pictures[0])
    (rank, name, share), other = first.split(), second.split()
    assert (rank, other[0]) == ("1.", "2.")
    assert 1 >= float(share) >= float(other[2])
    assert ast.literal_eval(best) == {CLASSES.index(name): name}


def test_what_was_assumed_is_said_once_and_not_among_the_answers(weights, pictures, capsys):
    assert run(*pictures[:3], "--pretrained", weights, "--batch_size", 1, "--json") == 0
    output = capsys.readouterr()
    assert output.err == about(weights)
    assert [json.loads(line)["path"] for line in output.out.splitlines()] == list(map(str, pictures[:3]))
    assert run(pictures[0], "--pretrained", weights, "--padding", "same") == 0
    assert capsys.readouterr().err == (
        f"--padding same goes, where symmetric is usual for weights from mnv2: mind the accuracy\n{about(weights)}"
    )


def test_bad_files_are_named_and_the_others_predicted(weights, pictures, tmp_path, capsys):
    (tmp_path / "cut.jpg").write_bytes(pictures[1].read_bytes()[:-300])
    shutil.copy(pictures[2], os.fsencode(tmp_path) + b"/\xff.jpg")
    write_undecodable(tmp_path / "bad.png")
    names = [tmp_path / "bad.png", tmp_path / "cut.jpg", tmp_path / "missing.jpg"]
    unspeakable = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    # The loader is some batches ahead: it meets the bad file after it has given others.
    given = [*pictures[:5], names[0], pictures[5], *names[1:], names[0], unspeakable, pictures[6]]
    assert run(*given, "--pretrained", weights, "--batch_size", 1, "--json") == 1
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("mnv2.predict: ")]
    assert lines[:2] == [
        f"mnv2.predict: {names[1]} is a truncated JPEG",
        f"mnv2.predict: {names[2]} can't be read: No such file or directory",
    ]
    assert lines[2].endswith(r"/\udcff.jpg has a name that isn't UTF-8")
    assert lines[3:] == [f"mnv2.predict: {names[0]} looks whole but can't be decoded"] * 2
    assert [json.loads(line)["path"] for line in output.out.splitlines()] == list(map(str, pictures))


def test_folders_give_their_pictures_in_order(weights, pictures, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    root = pictures[0].parent.parent
    assert run(root, "--pretrained", weights, "--json") == 0
    assert list(told(capsys)) == list(map(str, pictures))
    assert run(tmp_path, "--pretrained", weights) == 1
    problem = f"mnv2.predict: {tmp_path} holds no pictures; passed over as no pictures by name: 1 .txt\n"
    assert capsys.readouterr() == ("", about(weights) + problem)


def test_a_folder_that_cant_be_read_is_named(tmp_path, monkeypatch):
    def walk(folder, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", folder))
        return iter(())

    monkeypatch.setattr(os, "walk", walk)  # root can read every folder
    found = list(files.find_pictures([str(tmp_path)], ""))
    assert found == [files.Problem(str(tmp_path), "can't be read: Permission denied")]


def test_one_picture_comes_from_stdin(weights, pictures, monkeypatch, tmp_path, capsys):
    assert run(pictures[0], "--pretrained", weights, "--json") == 0
    (expected,) = told(capsys).values()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pictures[0].read_bytes())))
    assert run("-", "--pretrained", weights, "--json", "--save", tmp_path) == 0
    assert told(capsys) == {"-": expected}
    assert os.listdir(tmp_path) == ["stdin.jpeg"]
    assert run("-", "--pretrained", weights) == 1  # nothing is left of it
    assert capsys.readouterr() == ("", about(weights) + "mnv2.predict: - is empty\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pictures[0].read_bytes())))
    assert run("-", "-", "--pretrained", weights, "--json") == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["classes"] == expected
    assert output.err == about(weights) + "mnv2.predict: - was given before, and stdin holds one picture\n"


def test_saved_pictures_have_their_label_drawn_on_them(weights, tmp_path, capsys):
    for place, kind in (("a", "PNG"), ("b", "PNG"), ("c", "JPEG")):
        (tmp_path / place).mkdir()
        photo(3, 120, 90).save(tmp_path / place / ("same.png" if kind == "PNG" else "other.jpg"), kind)
    kept = (tmp_path / "a" / "same.png").read_bytes()
    assert run(tmp_path / "a", tmp_path / "b", tmp_path / "c", "--pretrained", weights, "--save", tmp_path / "a") == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["other.jpg", "same.png", "same_2.png", "same_3.png"]
    assert (tmp_path / "a" / "same.png").read_bytes() == kept
    before, after = (np.asarray(Image.open(tmp_path / "a" / name)) for name in ("same.png", "same_2.png"))
    assert before.shape == after.shape
    changed = (before != after).any(-1)
    box = changed.any(1).sum(), changed.any(0).sum()
    assert 10 <= box[0] <= 45  # a line or two at the top
    assert changed[: box[0], : box[1]].mean() > 0.99
    assert after[: box[0], : box[1]].min() == 0  # the box
    assert after[: box[0], : box[1]].max() > 200  # the letters
    assert np.array_equal(before[box[0] :], after[box[0] :])
    assert Image.open(tmp_path / "a" / "other.jpg").format == "JPEG"


def test_a_label_is_broken_into_lines_where_it_is_longer_than_the_picture_is_wide(tmp_path):
    photo(3, 64, 64).save(tmp_path / "x.png")
    for number, words in ((2, "cat 93%"), (3, "great white shark, man-eater 93%")):
        assert caption.save_captioned(str(tmp_path / "x.png"), words, str(tmp_path)).endswith(f"x_{number}.png")
    original, short, long = (np.asarray(Image.open(tmp_path / f"x{end}.png")) for end in ("", "_2", "_3"))
    assert (original != long).any((1, 2)).sum() > 1.5 * (original != short).any((1, 2)).sum()


def test_saving_without_pillow_says_what_to_install(weights, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caption, "_ABSENT", ImportError("No module named 'PIL'"))
    assert run(pictures[0], "--pretrained", weights, "--save", tmp_path / "labelled") == 1
    assert capsys.readouterr().err == (
        "mnv2.predict: --save: needs Pillow (No module named 'PIL'): pip install pillow\n"
    )
    assert not (tmp_path / "labelled").exists()


def test_what_cant_be_saved_is_predicted_and_named(weights, pictures, monkeypatch, tmp_path, capsys):
    def write(picture, words):
        raise OSError("the disk is full")

    monkeypatch.setattr(caption, "_write", write)
    assert run(pictures[0], "--pretrained", weights, "--save", tmp_path, "--json") == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["path"] == str(pictures[0])
    assert (
        output.err == f"{about(weights)}mnv2.predict: {pictures[0]} can't be saved with its label: the disk is full\n"
    )


def test_classes_have_the_names_that_are_known():
    assert class_names(3, list(CLASSES)) == list(CLASSES)
    assert class_names(3, ["n02123394", "", "dog"]) == ["Persian cat", "1", "dog"]
    assert class_names(1000, None)[283] == "Persian cat"
    assert class_names(1000, list(map("class {}".format, range(1000))))[283] == "class 283"
    assert class_names(2, None) == ["0", "1"]


def test_a_thousand_outputs_are_imagenets(pictures, tmp_path, capsys):
    network = MobileNetV2(0.35, num_classes=1000)
    torch.nn.init.zeros_(network.classifier[1].weight)
    torch.nn.init.zeros_(network.classifier[1].bias)
    network.classifier[1].bias.data[283] = 9
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w")
    assert run(pictures[0], "--pretrained", tmp_path / "w") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[1].split() == ["1.", "Persian", "cat", f"{np.exp(9) / (np.exp(9) + 999):.4f}"]
    assert lines[-1] == "{283: 'Persian cat'}"


def test_numbers_that_arent_finite_are_no_answer(model, pictures, tmp_path, capsys):
    broken = MobileNetV2(0.35, num_classes=3)
    broken.load_state_dict(model.state_dict())
    broken.classifier[1].weight.data[1] = 3e38
    save_weights(tmp_path / "w", broken, None)
    assert run(pictures[0], "--pretrained", tmp_path / "w") == 1
    assert capsys.readouterr() == (
        "",
        f"{about(tmp_path / 'w')}mnv2.predict: {pictures[0]} makes the network give numbers that aren't finite\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pretrained", "missing.pt"], "--pretrained: can't read missing.pt: No such file or directory"),
        (["--pretrained", "false"], "--pretrained: expected weights, got False, which is a network that has learnt"),
        ([], "--pretrained: no weights of alpha 0.35 at 32 px in "),
    ],
)
def test_missing_weights_are_one_line(pictures, tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path))
    assert run(pictures[0], *words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"mnv2.predict: {message}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "FILE"), (["a.jpg", "--topk", "0"], "--topk: expected a positive integer, got 0")],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_comma_in_a_name_parts_nothing():
    config = predict.parse(predict.PredictConfig, ["a,b.jpg", "c d.jpg", "-"], "")
    assert config.files == ("a,b.jpg", "c d.jpg", "-")


def test_real_photographs_are_predicted_as_expected(test_data, capsys):
    expected = np.load(test_data / "imagenet_samples_logits.npz")
    files = [test_data / "imagenet_samples" / "val" / name for name in expected["files"][:10]]
    words = ["--pretrained", test_data / "mobilenetv2_1.0_224_real.safetensors", "--json", "--device", "cpu"]
    assert predict.main(list(map(str, [*files, *words]))) == 0
    found = told(capsys)
    assert list(found) == list(map(str, files))
    assert [classes[0]["class"] for classes in found.values()] == expected["logits"][:10].argmax(1).tolist()
    assert found[str(files[0])][0]["name"] == "tench, Tinca tinca"


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "x.jpg", "--pretrained", "y.pt", "--device", "cpu"])
    monkeypatch.delitem(sys.modules, "mnv2.predict")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mnv2.predict", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "mnv2.predict: --pretrained: can't read y.pt: No such file or directory\n")
