from __future__ import annotations

import pytest

from mnv2.errors import InputError
from mnv2.labels import class_index, imagenet_classes, read_labels

SOME = ["n02123394", "n01440764", "n15075141"]  # Persian cat, tench, toilet tissue


def test_imagenets_classes():
    classes = imagenet_classes()
    assert len(classes) == len({identifier for identifier, _ in classes}) == 1000
    assert [identifier for identifier, _ in classes] == sorted(identifier for identifier, _ in classes)
    assert classes[0][0] == "n01440764"
    assert classes[0][1].startswith("tench")
    assert classes[283] == ("n02123394", "Persian cat")


def test_auto_takes_imagenets_numbers_for_a_subset():
    index = class_index("auto", SOME, outputs=1000)
    assert index.labels(SOME) == [283, 0, 999]
    assert "ImageNet" in index.source


@pytest.mark.parametrize("outputs", [None, 10, 1001])
def test_auto_takes_folders_for_another_network(outputs):
    index = class_index("auto", SOME, outputs=outputs)
    assert index.labels(sorted(SOME)) == [0, 1, 2]
    assert "folders" in index.source


def test_auto_takes_folders_where_one_is_no_wordnet_id():
    assert class_index("auto", [*SOME, "unknown"], outputs=1000).numbers["unknown"] == 3


def test_auto_takes_what_the_weights_recorded():
    index = class_index("auto", ["bee"], trained=["ant", "bee"], folders=["zebra"], outputs=2)
    assert index.labels(["bee"]) == [1]
    with pytest.raises(InputError, match="the weights' own record gives 2 classes, and 'cat' is not among them"):
        class_index("auto", ["bee", "cat"], trained=["ant", "bee"], outputs=2)


def test_folders_are_those_of_training_where_there_are_any():
    index = class_index("folders", ["cat"], folders=["cat", "ant", "bee"])
    assert index.numbers == {"ant": 0, "bee": 1, "cat": 2}
    assert "train/" in index.source
    with pytest.raises(InputError, match="'dog' is not among them"):
        class_index("folders", ["dog"], folders=["ant", "bee"])


def test_imagenet_on_request_refuses_other_names():
    assert class_index("imagenet", SOME, outputs=7).labels(SOME) == [283, 0, 999]
    with pytest.raises(InputError, match=r"'7' is not among them \(2 such classes\)"):
        class_index("imagenet", ["7", "8"])


@pytest.mark.parametrize(
    "text",
    [
        "cat\nant\nbee\n",
        "0\tcat\tCat\n1\tant\tAnt\n2\tbee\tBee\n",
        "2,bee\n0,cat\n1,ant\n",
        "\ufeffcat\r\nant\r\nbee\r\n",
    ],
    ids=["names", "table", "csv", "windows"],
)
def test_a_file_decides(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8", newline="")
    index = class_index(str(path), ["ant", "cat"], trained=["ant", "cat"])
    assert index.numbers == {"cat": 0, "ant": 1, "bee": 2}
    assert index.names(4) == ["cat", "ant", "bee", ""]
    assert len(index) == 3


def test_digits_in_a_file_are_names_unless_they_number(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("9\n8\n7\n")
    assert class_index(str(path), ["8"]).labels(["8"]) == [1]


@pytest.mark.parametrize(
    "text",
    ["", "ant\nant\n", "0\tant\n0\tbee\n", "0\n1,ant\n", "ant,x\nbee,y\n"],
    ids=["empty", "name-twice", "number-twice", "half-numbered", "two-names"],
)
def test_a_file_that_cant_decide_is_refused(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="--class_index: expected one class a line"):
        class_index(str(path), ["ant"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="--class_index: can't read .*nowhere.txt: No such file"):
        class_index(str(tmp_path / "nowhere.txt"), ["ant"])


FILES = ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]


@pytest.mark.parametrize(
    "text",
    [
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000001,n02123394 85 1 499 272\nILSVRC2012_val_00000002,n01440764 1 2 3 4 n01440764 5 6 7 8\n",
        "ILSVRC2012_val_00000001.JPEG n02123394\nILSVRC2012_val_00000002.JPEG n01440764\n",
        "val/ILSVRC2012_val_00000001.JPEG\tn02123394\r\n\r\nval/ILSVRC2012_val_00000002.JPEG\tn01440764\r\n",
    ],
    ids=["kaggle", "spaces", "tabs"],
)
def test_labels_are_read(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, newline="")
    assert read_labels(str(path), FILES) == {FILES[0]: "n02123394", FILES[1]: "n01440764"}


@pytest.mark.parametrize("line", ["gone.jpg cat", "gone n02123394"])
def test_a_first_line_that_names_a_missing_picture_is_no_heading(tmp_path, line):
    path = tmp_path / "labels.txt"
    path.write_text(f"{line}\na.jpg dog\n")
    assert line.split()[0] in read_labels(str(path), ["a.jpg"])


def test_names_with_spaces_are_kept(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a b.jpg,golden retriever,left\nc.jpg,golden eagle\n")
    assert read_labels(str(path), ["a b.jpg", "c.jpg"]) == {"a b.jpg": "golden retriever", "c.jpg": "golden eagle"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg cat\nb.jpg\n", "expected a name and a class in line 2"),
        ("a.jpg cat\na.jpg dog\n", "gives a.jpg two classes, cat and dog"),
        ("a.jpg cat\na dog\n", "gives a.jpg two classes, cat and dog"),
    ],
)
def test_labels_that_cant_be_read_are_refused(tmp_path, text, words):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_labels(str(path), ["a.jpg", "b.jpg"])


def test_a_binary_file_is_no_list(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="--val_labels: expected a text file"):
        read_labels(str(path), [])
