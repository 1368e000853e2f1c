from __future__ import annotations

import os
import re
import shutil

import pytest
import torch
from samples import CLASSES, photo, write_photos

from mnv2.config import DEFAULT_DATA, TrainConfig
from mnv2.distributed import World
from mnv2.errors import InputError
from mnv2.files import check_pictures, list_pictures, prepare
from mnv2.weights import Weights


@pytest.fixture
def data(photos, tmp_path):
    """A copy of the photographs that a test may spoil."""
    shutil.copytree(photos, tmp_path / "data")
    return tmp_path / "data"


def listed(data, bad_files="error", split="val", **options):
    return check_pictures(list_pictures(str(data), split, **options), bad_files, World())


def test_lists_every_picture_with_its_class(photos):
    pictures = listed(photos, split="train")
    assert len(pictures) == 23
    assert pictures.paths == sorted(map(str, (photos / "train").rglob("*.jpg")))
    assert pictures.names == [path.split("/")[-2] for path in pictures.paths]
    assert pictures.classes == list(CLASSES)


def test_folders_within_a_class_folder_count(data):
    deep = data / "val" / "bee" / "more" / "and more"
    deep.mkdir(parents=True)
    photo(1, 40, 40).save(deep / "x.PNG")
    pictures = listed(data)
    assert len(pictures) == 12
    assert pictures.names[pictures.paths.index(str(deep / "x.PNG"))] == "bee"


def test_links_to_folders_count(data, tmp_path):
    write_photos(tmp_path / "elsewhere", 4, classes=("dog",))
    (data / "val" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    assert listed(data).names.count("dog") == 4


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_above_is_not_followed(data, capsys, target):
    (data / "val" / "ant" / "deep").mkdir()
    (data / "val" / "ant" / "deep" / "loop").symlink_to(target)
    assert len(listed(data)) == 11
    assert "1 link to a folder above" in capsys.readouterr().out


def test_other_files_are_passed_over_and_counted(data, capsys):
    for name in ("ant/notes.txt", "ant/Thumbs.db", "bee/clip.gif", "bee/._000.jpg", "README", ".DS_Store"):
        (data / "val" / name).write_bytes(b"x")
    for folder in (".cache", "ant/.cache"):
        (data / "val" / folder).mkdir()
        shutil.copy(data / "val" / "ant" / "000.jpg", data / "val" / folder)
    assert len(listed(data)) == 11
    line = capsys.readouterr().out
    assert "11 pictures of 3 classes" in line
    assert re.search("passed over as no pictures by name: .*4 hidden", line)
    for words in ("1 .txt", "1 .db", "1 .gif", "1 without extension"):
        assert words in line


def test_a_missing_folder_says_what_it_should_hold():
    with pytest.raises(InputError) as caught:
        list_pictures(DEFAULT_DATA + "-that-is-missing", "val")
    for words in (
        "--data_url: no folder ./dataset/imagenet",
        "train/ and val/",
        "python -m mnv2.digits",
        "--synthetic",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: shutil.rmtree(data / "val"), r"expected a folder val/ in .*, which holds train"),
        (
            lambda data: [shutil.rmtree(p) for p in (data / "val").iterdir()],
            "expected pictures in .*, which holds nothing",
        ),
        (
            lambda data: [p.unlink() for p in (data / "val").rglob("*.jpg")],
            "expected pictures in .*, which holds ant, bee",
        ),
    ],
    ids=["no-val", "no-classes", "no-pictures"],
)
def test_no_pictures_is_an_error(data, spoil, words):
    spoil(data)
    with pytest.raises(InputError, match=words):
        list_pictures(str(data), "val")


def test_a_flat_folder_asks_for_labels(tmp_path):
    (tmp_path / "val").mkdir()
    photo(1, 40, 40).save(tmp_path / "val" / "a.jpg")
    with pytest.raises(InputError, match="--val_labels: expected a file that tells the classes"):
        list_pictures(str(tmp_path), "val")


def test_a_flat_folder_with_labels(tmp_path):
    (tmp_path / "val").mkdir()
    for number, name in enumerate(("b.jpg", "a.jpg", "c.jpg")):
        photo(number, 40, 40).save(tmp_path / "val" / name)
    labels = tmp_path / "labels.csv"
    labels.write_text("name,class\na,n02123394\nb,n01440764\nc,n02123394\n")
    pictures = listed(tmp_path, val_labels=str(labels))
    assert [path[-5:] for path in pictures.paths] == ["a.jpg", "b.jpg", "c.jpg"]
    assert pictures.names == ["n02123394", "n01440764", "n02123394"]
    assert pictures.classes == ["n01440764", "n02123394"]

    labels.write_text("a.jpg,n02123394\nd.jpg,n01440764\n")
    with pytest.raises(
        InputError, match=r"b.jpg has no class in .*; .*c.jpg has no class .*; .*d.jpg is named in .* but"
    ):
        listed(tmp_path, val_labels=str(labels))
    assert len(listed(tmp_path, "skip", val_labels=str(labels))) == 1


FAULTS = {
    "zero-length": (lambda data: (data / "val" / "ant" / "000.jpg").write_bytes(b""), "000.jpg is empty"),
    "no-picture": (lambda data: (data / "val" / "ant" / "000.jpg").write_bytes(b"<html>"), "000.jpg is not a picture"),
    "truncated": (lambda data: truncate(data / "val" / "ant" / "000.jpg"), "000.jpg is a truncated JPEG"),
    "unreadable": (lambda data: (data / "val" / "bee" / "x.jpg").symlink_to("nowhere"), "x.jpg can't be read: No such"),
    "empty-class": (lambda data: (data / "val" / "dog").mkdir(), "dog is a class without pictures"),
    "stray": (lambda data: shutil.copy(data / "val/ant/000.jpg", data / "val/x.jpg"), "x.jpg lies in no class folder"),
}


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_stops_the_run_by_name_or_is_left_out(data, capsys, fault):
    spoil, words = FAULTS[fault]
    spoil(data)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        listed(data)
    assert "\n" not in str(caught.value)
    assert "--bad_files skip" in str(caught.value)

    pictures = listed(data, "skip")
    assert len(pictures) == (11 if fault in ("unreadable", "empty-class", "stray") else 10)
    assert len(pictures.paths) == len(pictures.names)
    assert not any(path.endswith(words.split()[0]) and "val/ant" in path for path in pictures.paths)
    printed = capsys.readouterr().out
    assert re.search(f"left out: .*{re.escape(words)}", printed)
    assert ", 1 left out as named above" in printed


def test_many_bad_files_are_all_listed_when_left_out(data, capsys):
    for path in sorted((data / "train").rglob("*.jpg"))[:15]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="; and 5 more"):
        listed(data, split="train")
    assert len(listed(data, "skip", split="train")) == 8
    assert capsys.readouterr().out.count("left out: ") == 15


def test_nothing_left_is_an_error(data):
    for path in (data / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="but all 11 are damaged"):
        listed(data, "skip")


def test_an_empty_class_keeps_its_number(data):
    shutil.rmtree(data / "val" / "bee")
    (data / "val" / "bee").mkdir()
    shutil.rmtree(data / "train")
    config = TrainConfig(data_url=str(data), bad_files="skip")
    _, index, outputs = prepare(list_pictures(str(data), "val"), config, World())
    assert outputs == 3
    assert index.numbers == {"ant": 0, "bee": 1, "cat": 2}


def test_a_validation_set_that_lacks_a_class_is_numbered_as_training(data):
    shutil.rmtree(data / "val" / "ant")
    pictures, index, _ = prepare(list_pictures(str(data), "val"), TrainConfig(data_url=str(data)), World())
    assert set(index.labels(pictures.names)) == {1, 2}


def test_too_few_outputs_are_refused(photos):
    pictures = list_pictures(str(photos), "val")
    with pytest.raises(InputError, match="--num_classes: expected at least 3 .*, got 2"):
        prepare(pictures, TrainConfig(data_url=str(photos), num_classes=2), World())
    with pytest.raises(InputError, match="--pretrained: expected at least 3 .*, got 2"):
        prepare(pictures, TrainConfig(data_url=str(photos)), World(), outputs_of(2))


def outputs_of(count):
    return Weights("w.pth", {"classifier.1.weight": torch.ones(count, 8)})


def test_numbers_are_not_guessed_for_weights_with_other_outputs(photos):
    """Five outputs and three folders: which is which is not the folders' to say."""
    pictures = list_pictures(str(photos), "val")
    with pytest.raises(InputError, match="--class_index: expected folders, .* since w.pth has 5 outputs"):
        prepare(pictures, TrainConfig(data_url=str(photos)), World(), outputs_of(5))
    _, index, outputs = prepare(
        pictures, TrainConfig(data_url=str(photos), class_index="folders"), World(), outputs_of(5)
    )
    assert (index.numbers, outputs) == ({"ant": 0, "bee": 1, "cat": 2}, 5)


def test_labels_that_name_no_picture_are_refused(tmp_path):
    (tmp_path / "val").mkdir()
    photo(1, 40, 40).save(tmp_path / "val" / "a.jpg")
    labels = tmp_path / "labels.csv"
    labels.write_text("A.png,cat\nB.png,dog\n")
    with pytest.raises(InputError, match="--val_labels: .* names none of the 1 pictures"):
        list_pictures(str(tmp_path), "val", str(labels))


def test_a_name_that_is_not_utf8_is_passed_over_and_counted(data, capsys):
    with open(os.fsencode(data / "val" / "ant") + b"/bad\xff.jpg", "wb") as file:
        file.write((data / "val" / "ant" / "000.jpg").read_bytes())
    assert len(listed(data)) == 11
    assert "1 whose name isn't UTF-8" in capsys.readouterr().out
