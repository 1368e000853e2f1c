from __future__ import annotations

import base64
import io
import pickle
import random
import re
import zipfile

import mindspore_bytes
import numpy as np
import pytest
import torch
from mindspore_bytes import checkpoint, field, value, varint
from recorded_peers import recorded

from mnv2 import MobileNetV2, mindspore_file

# Written by MindSpore 2.10's save_checkpoint: four parameters with crc_check and append_dict, and one with enc_key.
REAL = base64.b64decode(
    "CjwKEWZlYXR1cmVzLjAud2VpZ2h0EicIAggDEgdGbG9hdDMyGhgAAAAAAACAPgAAAD8AAEA/AACAPwAAoD8KJgoRY2xhc3NpZmllci4xLmJpYXMSEQgC"
    "EgdGbG9hdDE2GgQAPgDACiAKDWxlYXJuaW5nX3JhdGUSDxIHRmxvYXQzMhoEAABgQAovChltb21lbnRzLmNsYXNzaWZpZXIuMS5iaWFzEhIIAhIIQkZs"
    "b2F0MTYaBMA/AMAKHgoJZXBvY2hfbnVtEhESBUludDY0GggDAAAAAAAAAAoZCgRub3RlEhEIABIDc3RyGghoAAAAaQAAAAoRCgRkb25lEgkSBEJvb2wa"
    "AQFjcmNfbnVtAAAAAAAA3R7LZQ=="
)
ENCRYPTED = base64.b64decode(
    "2F46fz2ayDRp5ups2O2tRwv65RtAAAAAEAAAAPajAYDv4y2IGDgPTXYp0MYoAAAAGB+vDtCdB7e02sdHQjNUKy4vDdF+cpVjDE4hpKrjaO+x8wImUq9/"
    "0A=="
)


@pytest.fixture
def read(tmp_path):
    def read(content: bytes) -> dict[str, torch.Tensor]:
        path = tmp_path / "weights.ckpt"
        path.write_bytes(content)
        return mindspore_file.read(str(path))

    return read


def test_what_mindspore_wrote_is_read(read):
    tensors = read(REAL)
    expected = {
        "features.0.weight": torch.arange(6.0).reshape(2, 3) / 4,
        "classifier.1.bias": torch.tensor([1.5, -2], dtype=torch.float16),
        "learning_rate": torch.tensor(3.5),
        "moments.classifier.1.bias": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "epoch_num": torch.tensor(3),
        "done": torch.tensor(True),
    }
    assert list(tensors) == list(expected)  # the text is passed over
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_tests_encoder_writes_what_mindspore_wrote():
    start = [("features.0.weight", np.arange(6, dtype="f4").reshape(2, 3) / 4)]
    assert REAL.startswith(checkpoint([*start, ("classifier.1.bias", np.array([1.5, -2], "f2"))]))


def test_slices_are_joined_in_order(read):
    halves = [value("a.weight", (4,), "Float32", np.array(part, "f4").tobytes()) for part in ([0, 1, 2], [3])]
    assert read(b"".join(halves))["a.weight"].tolist() == [0, 1, 2, 3]


def test_packed_dimensions_and_unknown_fields_are_read(read):
    dims = field(1, varint(1) + varint(300))  # as newer versions of protobuf may write them
    newer = field(9, b"new") + b"\x50\x01" + b"\x5d" + b"four" + b"\x61" + b"eightnew"
    tensor = dims + field(2, b"Int8") + newer + field(3, bytes(range(100)) * 3)
    content = newer + field(1, newer + field(1, b"a") + field(2, tensor))
    assert read(content)["a"].shape == (1, 300)


def scalar(name: str) -> bytes:
    return checkpoint([(name, np.float32([1]))])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no tensor"),
        (REAL[:-1], "cut off|checksum|damaged"),
        (REAL[:100], "cut off"),
        (REAL[:30] + b"!" + REAL[31:], "its checksum is wrong"),
        (ENCRYPTED, "encrypted"),
        (scalar("a") * 2, r"a has 8 bytes, but \(1,\) of Float32 are 4"),
        (scalar("a") + scalar("b") + scalar("a"), "it holds a twice"),
        (value("a", (2**40, 2**40), "Float32", b"1234"), "a has an impossible shape"),
        (value("a", (2**30,) * 3, "Float32", b"1234"), "a has 4 bytes"),
        (value("a", (0, 3), "Float32", b""), "a has an impossible shape"),
        (value("a", (1,) * 9, "Float32", b"1234"), "a has an impossible shape"),
        (value("a", (2,), "Complex64", b"1234"), "a type that isn't known, Complex64"),
        (value("a", (2,), "Int8", b"1") + value("a", (3,), "Int8", b"12"), "slices of a have different"),
        (value("a\nb", (1,), "Int8", b"1"), "no text"),
        (value("", (1,), "Int8", b"1"), "no text"),
        (value("a" * 501, (1,), "Int8", b"1"), "no text"),
        (field(1, field(1, b"a")), "a is no tensor"),
        (field(1, field(1, b"a") + field(3, b"")), "a is no tensor but a map"),
        (field(1, field(1, b"a") + field(2, field(2, b"Int8"))), "a has no content"),
        (b"\x0a" + varint(2**62) + b"12", "cut off"),
        (b"\x0a" + b"\xff" * 11, "damaged"),
        (b"\x03\x04", "damaged"),
        (b"\x00" * 100, "damaged"),
        (pickle.dumps({"a": [1, 2, 3]}), "damaged|cut off"),
        (b"<html>404 not found</html>", "damaged|cut off"),
    ],
    ids=[
        "empty", "cut-checksum", "cut", "changed", "encrypted", "twice-in-a-row", "twice", "huge", "huge-product",
        "none", "dimensions", "type", "slices", "name-of-lines", "no-name", "long-name", "nothing", "map", "no-content",
        "lying-length", "long-number", "wire-type", "zeros", "pickle", "html",
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_in_one_line(read, content, words):
    with pytest.raises(ValueError, match=words) as error:
        read(content)
    assert "\n" not in str(error.value)


def refusal(read, content: bytes) -> str:
    """What is said of ``content`` where it is refused."""
    try:
        read(content)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_damaged_files_raise_nothing_else(read):
    generator = random.Random(1)
    for _ in range(300):
        content = bytearray(REAL if generator.random() < 0.2 else REAL[:-17])  # without its checksum all is looked at
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        mindspore_file.looks_like(bytes(content[:64]))
        assert re.fullmatch("(ValueError: .+)?", refusal(read, bytes(content)))


@pytest.mark.parametrize("size", [9, 43, 64, 200])
def test_checkpoints_are_known_by_their_start(size):
    assert mindspore_file.looks_like(REAL[:size])
    assert mindspore_file.looks_like(ENCRYPTED[:size])
    long = value("backbone.features.0.features.0.weight", (32, 3, 3, 3), "Float32", bytes(4 * 32 * 27))
    assert mindspore_file.looks_like(long[:size])


def other_files() -> dict[str, bytes]:
    zipped, saved = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a", "b")
    torch.save({"a": torch.ones(2)}, saved)
    operation = field(1, b"input") + field(2, b"Placeholder")
    return {
        "nothing": b"",
        "lines": b"\n" * 100,
        "text": b"\n\nfeatures.0.weight\n",
        "pickle": pickle.dumps({"a": 1}),
        "zip": zipped.getvalue(),
        "torch": saved.getvalue(),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "safetensors": (b"\n\n\n" + bytes(5) + b'{"a":{' * 20),
        "html": b"\n<!DOCTYPE html>" * 9,
        "tensorflow": field(1, operation) * 3,
        "onnx": b"\x08\x08\x12\x07pytorch" * 9,
    }


@pytest.mark.parametrize("kind", other_files())
def test_other_files_are_not_taken_for_checkpoints(kind):
    assert not mindspore_file.looks_like(other_files()[kind][:64])


def torchvision_state(peer: str) -> list[str]:
    """Torchvision's names of a peer's, in the peer's order."""
    names = list(recorded(peer).variants[0].shapes)
    return [mindspore_file.torchvision_name(name) for name in names]


@pytest.mark.parametrize("peer", ["mindcv", "mindvision"])
def test_names_are_torchvisions(peer):
    ours = [name for name in MobileNetV2(0.35).state_dict() if not name.endswith("num_batches_tracked")]
    assert sorted(torchvision_state(peer)) == sorted(ours)


@pytest.mark.parametrize("classifier", ["head.1", "head.2", "head.head.1", "head.dense", "dense"])
@pytest.mark.parametrize("prefix", ["backbone.features.", "features.", "backbone."])
def test_names_of_the_model_zoo_are_torchvisions(classifier, prefix):
    """Its backbone is mindvision's, with or without the name of the whole; its heads are as old as they are many."""
    of_vision = list(recorded("mindvision").variants[0].shapes)
    names = [name.replace("backbone.features.", prefix, 1) for name in of_vision]
    names = [name.replace("head.classifier", classifier) for name in names]
    assert [mindspore_file.torchvision_name(name) for name in names] == torchvision_state("mindvision")


@pytest.mark.parametrize("peer", ["mindcv", "mindvision"])
def test_what_training_keeps_is_no_weight(peer):
    names = list(recorded(peer).variants[0].shapes)
    kept = ["global_step", "learning_rate", "epoch_num", *(f"moments.{name}" for name in names)]
    assert {mindspore_file.torchvision_name(name) for name in kept} == {None}


@pytest.mark.parametrize("name", ["conv1.weight", "features.0.0.weight", "features.3.layers.0.scale", "head.3.weight"])
def test_unknown_names_stay(name):
    assert mindspore_file.torchvision_name(name) == name


def test_shapes_are_torchvisions():
    convolution, depthwise = torch.randn(5, 8, 1, 1), torch.randn(1, 8, 3, 3)
    name = "features.1.conv.0.0.weight"
    assert mindspore_file.torchvision_tensor("classifier.1.weight", convolution).shape == (5, 8)
    ascend = mindspore_file.torchvision_tensor(name, depthwise)
    assert ascend.shape == (8, 1, 3, 3)
    assert torch.equal(ascend[3, 0], depthwise[0, 3])
    for other, tensor in (("features.2.conv.2.weight", torch.randn(1, 8, 1, 1)), (name, torch.randn(8, 1, 3, 3))):
        assert torch.equal(mindspore_file.torchvision_tensor(other, tensor), tensor)


def test_the_encoder_knows_long_numbers():
    assert mindspore_bytes.varint(0) == b"\0"
    assert mindspore_bytes.varint(300) == b"\xac\x02"
