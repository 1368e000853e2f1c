from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import finish, start
from safetensors.torch import save_file
from samples import in_layout, save_weights

from mnv2 import MobileNetV2, fold, pretrained, weights
from mnv2.config import OPEN, ValidateConfig
from mnv2.errors import InputError
from mnv2.pretrained import build, find, follow
from mnv2.registry import SOURCES


@pytest.fixture
def model():
    return MobileNetV2(0.35, num_classes=4)


def contiguous(model):
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def save(model, path, kind):
    if kind == "safetensors":
        save_file(contiguous(model), path)
    elif kind == "state dict":
        torch.save(model.state_dict(), path)
    elif kind == "old state dict":
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save_weights(path, model, ["a", "b", "c", "d"])


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "old state dict", "checkpoint"])
def test_weights_come_back_as_they_were(model, tmp_path, kind):
    path = tmp_path / "weights"  # known by content, not by name
    save(model, path, kind)
    read = weights.read(str(path))
    assert read.num_classes == 4
    assert read.classes == (["a", "b", "c", "d"] if kind == "checkpoint" else None)
    other = MobileNetV2(0.35, num_classes=4)
    read.load_into(other)
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


CLASSIFIER = {"classifier.1.weight": torch.ones(4, 8)}


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: torch.save({"a": torch.ones(2).int()}, path), "expected plain floats for a, got"),
        (lambda path: torch.save({"a": torch.eye(2).to_sparse()}, path), "expected plain floats"),
        (lambda path: torch.save({3: torch.ones(2)}, path), "expected a tensor for every name, but 3 is none"),
        (lambda path: os.mkfifo(path), "expected a file of weights"),
        (lambda path: torch.save({"model": CLASSIFIER, "classes": 5}, path), "expected 4 names as its record"),
        (lambda path: torch.save({"model": CLASSIFIER, "classes": ["a"]}, path), "expected 4 names as its record"),
        (lambda path: None, "can't read .*: No such file"),
        (lambda path: path.mkdir(), "expected model.safetensors or .* in the folder, got neither"),
        (lambda path: path.write_bytes(b""), "is damaged or no file of weights"),
        (lambda path: path.write_bytes(b"<html>404 not found</html>" * 10), "is no file of plain weights|is damaged"),
        (lambda path: path.write_bytes(pickle.dumps(Harmful())), "is no file of plain weights"),
        (lambda path: torch.save({"model": Harmful()}, path), "is no file of plain weights"),
        (lambda path: torch.save([1, 2], path), "expected a state dict, got list"),
        (lambda path: torch.save({}, path), "expected MobileNetV2's tensors by the names of .*, got nothing"),
        (lambda path: torch.save({"epoch": 3}, path), "expected a tensor for every name, but 'epoch' is none"),
        (lambda path: save_file({"layer1.0.conv1.weight": torch.ones(1)}, path), "by the names .* got layer1"),
        (lambda path: cut(path, lambda p: save_file({"classifier.1.weight": torch.ones(4, 1280)}, p)), "is damaged"),
        (lambda path: cut(path, lambda p: torch.save({"classifier.1.weight": torch.ones(4, 1280)}, p)), "is damaged"),
    ],
    ids=[
        "integers", "sparse", "integer-names", "pipe", "class-number", "too-few-classes",
        "missing", "folder", "empty", "html", "pickle", "pickle-in-zip", "list", "nothing", "numbers", "resnet",
        "cut-safetensors", "cut-pth",
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_refused_and_not_run(tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(InputError, match=words) as caught:
        weights.read(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "harm").exists()


def cut(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[:-2000])


def test_weights_of_another_network_are_refused_by_the_first_name(model, tmp_path):
    path = tmp_path / "weights"
    save_file(contiguous(model), path)
    read = weights.read(str(path))
    with pytest.raises(InputError, match=r"features.0.0.weight of shape \(16, 3, 3, 3\), but .*--alpha 1.0 .*\(32, 3"):
        read.load_into(MobileNetV2(1.0, 4))
    with pytest.raises(InputError, match=r"classifier.1.weight of shape \(4, 1280\), .* 7 classes has \(7, 1280\)"):
        read.load_into(MobileNetV2(0.35, 7))
    for change, words in (
        (lambda state: state.pop("features.3.conv.1.0.weight"), "lacks features.3.conv.1.0.weight"),
        (lambda state: state.update({"extra.weight": torch.ones(1)}), "holds extra.weight"),
    ):
        state = contiguous(model)
        change(state)
        with pytest.raises(InputError, match=words):
            weights.Weights("x", state).load_into(model)


def config(**given):
    return ValidateConfig(**given)


def test_a_checkpoint_remembers_its_network(tmp_path):
    path = str(tmp_path / "last.pt")
    own = {"alpha": 0.35, "padding": "same", "norm_eps": 1e-3, "preprocessing": "timm", "resize": 96}
    save_weights(path, MobileNetV2(0.35, 4, padding="same", norm_eps=1e-3), ["a", "b", "c", "d"], **own)
    read = weights.read(path)
    assert {name: getattr(read, name) for name in own} == own
    assert (read.source, read.assumed) == ("mnv2", ())

    followed = follow(config(), read)
    assert (followed.alpha, followed.padding, followed.norm_eps, followed.preprocessing) == (0.35, "same", 1e-3, "timm")
    model = build(followed, 4, read)
    assert (model.alpha, model.padding, model.norm_eps) == (0.35, "same", 1e-3)


def test_what_the_user_says_goes_and_is_told(model, tmp_path):
    path = str(tmp_path / "last.pt")
    save_weights(path, model, None, padding="same", preprocessing="timm")
    read, said = weights.read(path), []
    followed = follow(config(padding="symmetric", preprocessing="tf", norm_eps=1e-5), read, said.append)
    assert (followed.padding, followed.preprocessing) == ("symmetric", "tf")
    assert [line.split()[:2] for line in said] == [["--padding", "symmetric"], ["--preprocessing", "tf"]]
    with pytest.raises(InputError, match=f"--alpha: {path} is of a network with alpha 0.35, got 0.75"):
        find(config(pretrained=path, alpha=0.75))
    assert follow(config(alpha=0.36), find(config(pretrained=path, alpha=0.36))).alpha == 0.36  # the same widths


def test_what_nobody_says_is_told_too():
    said = []
    followed = follow(config(), weights.Weights("w.pth", {}, alpha=1.0, padding="same", norm_eps=1e-3), said.append)
    assert (followed.padding, followed.preprocessing) == ("same", "reference")
    assert said.pop() == "--preprocessing reference is taken, since w.pth doesn't say what it wants"
    other = weights.Weights("w.pth", {}, padding="same", norm_eps=1e-3, wants="mean 0 0 0")
    follow(config(), other, said.append)
    assert said == ["--preprocessing reference is taken, since w.pth asks for mean 0 0 0, which no profile is"]


def test_without_weights_all_is_as_usual():
    followed = follow(config(pretrained=False), None)
    assert (followed.alpha, followed.padding, followed.norm_eps, followed.preprocessing) == tuple(OPEN.values())


def test_a_failed_load_changes_nothing(model):
    before = contiguous(model)
    with pytest.raises(InputError):
        weights.Weights("x", {**contiguous(MobileNetV2(0.35, 4)), "extra": torch.ones(1)}).load_into(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_true_looks_into_the_weights_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path / "none"))
    wanted = config(alpha=0.35, resize=96, weights_dir=str(tmp_path))
    with pytest.raises(InputError, match=f"^--pretrained: no weights of alpha 0.35 at 96 px in {tmp_path} .can't down"):
        find(wanted)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"no weights of alpha 0.6 at 224 px in .*none \(none is published\); none"):
        find(config(alpha=0.6))
    theirs, own = tmp_path / "mobilenet_v2_0.35_96.ckpt", tmp_path / "mobilenetv2_0.35_96.safetensors"
    save_file(in_layout(model.state_dict(), "transformers"), theirs)
    assert find(wanted).source == "transformers"
    save_file(contiguous(model), own)
    assert find(wanted).path == str(own)
    assert find(replace(wanted, pretrained="mindspore")).path == str(theirs)
    with pytest.raises(InputError, match=r"timm publishes none that can be read\); put there"):
        find(replace(wanted, pretrained="timm"))
    with pytest.raises(InputError, match=f"can't download .*; put it by hand at {tmp_path}/mobilenet_v2-7ebf99e0.pth$"):
        find(replace(wanted, pretrained="mobilenet_v2-7ebf99e0.pth"))
    with pytest.raises(InputError, match=r"mobilenet_v2_1.0_192.tgz must be converted first, by .*transformers"):
        find(replace(wanted, pretrained="mobilenet_v2_1.0_192.tgz"))

    assert find(config(pretrained=False)) is None
    assert find(config(pretrained=str(own))).alpha == 0.35
    monkeypatch.chdir(tmp_path)
    own.rename("timm")  # a file of that name is what is meant
    assert find(replace(wanted, pretrained="timm")).path == "timm"


def test_what_is_missing_is_downloaded(model, tmp_path, monkeypatch):
    fetched = []

    def fetch(source, folder):
        fetched.append(source.name)
        torch.save(model.state_dict(), tmp_path / source.name)

    monkeypatch.setattr(pretrained, "fetch", fetch)
    wanted = config(alpha=0.35, resize=192, weights_dir=str(tmp_path))
    for asked in (True, "mindspore", "mobilenet_v2_0.35_192.ckpt"):
        assert find(replace(wanted, pretrained=asked)).path == str(tmp_path / "mobilenet_v2_0.35_192.ckpt")
    assert fetched == ["mobilenet_v2_0.35_192.ckpt"]
    with pytest.raises(InputError, match="^--alpha: .*0.35_192.ckpt is of a network with alpha 0.35, got 0.5"):
        find(replace(wanted, alpha=0.5, pretrained=fetched[0]))


def test_what_has_a_published_name_is_what_was_published(model, tmp_path):
    path = tmp_path / "mobilenet_v2-7ebf99e0.pth"
    torch.save(model.state_dict(), path)
    wanted = config(pretrained=path.name, weights_dir=str(tmp_path))
    with pytest.raises(InputError, match=f"{path} isn't what torchvision publishes .*expected SHA-256 7ebf99e0, got"):
        find(wanted)
    assert find(replace(wanted, pretrained=str(path))).path == str(path)


def test_a_published_name_tells_the_resolution(model, tmp_path):
    path = tmp_path / "mobilenet_v2_0.35_96.ckpt"
    torch.save(model.state_dict(), path)
    found = find(config(pretrained=path.name, weights_dir=str(tmp_path)))
    assert found.resize == 96
    said = []
    follow(config(), found, said.append)
    assert said == [f"--resize 224 goes, where {path} was trained with 96"]


def test_origins_are_told_where_a_word_is_none(tmp_path):
    with pytest.raises(InputError, match="expected a file, a folder, or one of d-li14, keras, .*, got Timm$"):
        find(config(pretrained="Timm"))
    with pytest.raises(InputError, match=r"alpha 0.5 at 96 px .*\(keras publishes|can't download") as caught:
        find(config(pretrained="keras", alpha=0.5, resize=96, weights_dir=str(tmp_path)))
    assert "mindspore" not in str(caught.value)


def test_files_of_ours_may_be_read_by_others(model, tmp_path):
    old = os.umask(0o022)
    try:
        weights.Weights("x", contiguous(model), alpha=0.35).save(str(tmp_path / "a"))
        fold(model).save(str(tmp_path / "b"))
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o644, 0o644]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


SEVERAL = """
import os, sys, torch
from mnv2 import pretrained
from mnv2.config import ValidateConfig
from mnv2.distributed import world
from mnv2.errors import InputError
folder, state = sys.argv[1], torch.load(sys.argv[2])
def fetch(source, place):
    print("fetched", flush=True)
    torch.save(state, os.path.join(place, source.name))
pretrained.fetch = fetch
def told(**given):
    try:
        return pretrained.find(ValidateConfig(alpha=0.35, weights_dir=folder, **given), here).source
    except InputError as error:
        return str(error)
with world("cpu") as here:
    lines = here.gather(told(resize=96, pretrained="mindspore"))
    os.chdir(os.path.join(folder, str(here.rank)))
    lines += here.gather(told(pretrained="mobilenet_v2-7ebf99e0.pth"))
    lines += here.gather(told(pretrained="other"))
    lines += here.gather(told(pretrained="own.pt"))
    here.print("\\n".join(lines))
"""


def test_processes_find_the_same_or_nothing(model, tmp_path):
    """One downloads; a file that one alone has, or has otherwise, is refused by all, and none waits for another."""
    (tmp_path / "several.py").write_text(SEVERAL)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for rank in "01":
        (tmp_path / rank).mkdir()
        torch.save(MobileNetV2(0.35, 3 + int(rank)).state_dict(), tmp_path / rank / "other")
    for name in ("own.pt", "mobilenet_v2-7ebf99e0.pth"):
        torch.save(model.state_dict(), tmp_path / "0" / name)
    done = finish(start(tmp_path / "several.py", tmp_path, tmp_path / "state.pt", processes=2))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert sum(one.stdout.count("fetched") for one in done) == 1
    *_, first, second, a, b, c, d, e, f = done[0].stdout.splitlines()
    assert first == second == "torchvision"
    assert a == b
    assert "7ebf99e0.pth is a file for some processes, and none on" in a
    assert c == d
    assert "expected the same weights for all processes" in c
    assert e == f == "--pretrained: can't read own.pt: No such file or directory"


def test_a_published_file_is_known_again(model, tmp_path, monkeypatch):
    path = str(tmp_path / "renamed")
    torch.save(MobileNetV2(0.35).state_dict(), path)
    assert weights.read(path).preprocessing == "torchvision"
    (source,) = (source for source in SOURCES if "7ebf99e0" in source.name)
    seen = []
    monkeypatch.setattr(weights, "by_digest", lambda sha256: seen.append(sha256) or replace(source, resize=192))
    found = weights.read(path)
    assert (found.preprocessing, found.resize, found.assumed) == ("torchvision_v2", 192, ())
    assert found.sha256 == seen[0] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert weights.classes_in_words(found.classes) == "ImageNet-1k's"

    converted = str(tmp_path / "converted")
    found.save(converted)
    again = weights.read(converted)
    assert (seen[-1], again.sha256, again.preprocessing) == (found.sha256, found.sha256, "torchvision_v2")
    torch.save(model.state_dict(), path)  # of four classes, whatever its checksum
    assert weights.read(path).classes is None


def test_averaged_weights_are_taken_where_there_are_some(model, tmp_path):
    path = str(tmp_path / "last.pt")
    save_weights(path, model, None)
    assert str(weights.read(path)) == path
    average = MobileNetV2(0.35, num_classes=4)
    torch.save({"model": contiguous(model), "ema": contiguous(average), "classes": None, "config": {}}, path)
    for ema, expected in ((False, model), (True, average)):
        read = weights.read(path, ema=ema)
        assert all(torch.equal(read.state[name], tensor) for name, tensor in expected.state_dict().items())
        assert str(read) == path + (" (the average)" if ema else "")


def test_another_classifier_stays_the_models_own(model):
    given = MobileNetV2(0.35, num_classes=7)
    own = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    weights.Weights("x", given.state_dict()).load_into(model, classifier=False)
    assert all(torch.equal(own[name], tensor) for name, tensor in model.classifier.state_dict().items())
    for name, tensor in given.features.state_dict().items():
        assert torch.equal(model.features.state_dict()[name], tensor)
