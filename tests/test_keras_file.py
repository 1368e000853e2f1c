from __future__ import annotations

import io
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch
from recorded_peers import published_name, recorded

from mnv2 import MobileNetV2, keras_file
from mnv2.errors import InputError

KERNEL = np.arange(2 * 3 * 4 * 5, dtype="f4").reshape(2, 3, 4, 5)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "weights.h5")


@pytest.fixture
def file(path):
    """An HDF5 file to write."""
    with h5py.File(path, "w") as file:
        yield file


def read(file) -> dict[str, torch.Tensor]:
    path = file.filename
    file.close()
    return keras_file.read(path)


def test_tensors_come_in_torchs_order(file):
    file["Conv1/Conv1/kernel:0"] = KERNEL
    file["block_1_depthwise/block_1_depthwise/depthwise_kernel:0"] = KERNEL
    file["block_2_depthwise/block_2_depthwise/kernel"] = KERNEL[..., :1]
    file["predictions/predictions/kernel:0"] = KERNEL[0, 0]
    file["bn_Conv1/bn_Conv1/gamma:0"] = np.arange(3, dtype=">f8")
    file["bn_Conv1/bn_Conv1/beta:0"] = np.arange(3, dtype="f2")
    tensors = read(file)
    assert tensors["Conv1/kernel"].shape == (5, 4, 2, 3)
    assert tensors["Conv1/kernel"][4, 3, 1, 2] == KERNEL[1, 2, 3, 4]
    depthwise = tensors["block_1_depthwise/depthwise_kernel"]
    assert depthwise.shape == (20, 1, 2, 3)
    assert depthwise[3 * 5 + 4, 0, 1, 2] == KERNEL[1, 2, 3, 4]
    assert tensors["block_2_depthwise/kernel"].shape == (4, 1, 2, 3)
    assert tensors["predictions/kernel"][4, 3] == KERNEL[0, 0, 3, 4]
    assert tensors["bn_Conv1/gamma"].dtype == torch.float64
    assert tensors["bn_Conv1/gamma"].tolist() == [0, 1, 2]
    assert tensors["bn_Conv1/beta"].dtype == torch.float16


@pytest.mark.parametrize(
    "place",
    [
        "Conv1/Conv1/kernel:0", "Conv1/Conv1_3/kernel:0", "Conv1/kernel", "mobilenetv2_1.00_224/Conv1/kernel:0",
        "model_weights/Conv1/Conv1/kernel", "model_weights/mobilenetv2_1.00_224/Conv1/kernel",
        "layers/conv2d/vars/0", "layers/functional/layers/conv2d/vars/0",
    ],
)  # fmt: skip
def test_a_variable_is_known_wherever_keras_puts_it(file, place):
    file[place] = KERNEL
    if place.startswith(("model_weights", "layers")):  # an optimizer's variables lie beside
        file["optimizer_weights/Adam/Conv1/kernel:0"] = KERNEL
    assert list(read(file)) == ["Conv1/kernel"]


def test_an_archive_is_read(tmp_path, path, file):
    file["layers/conv2d/vars/0"] = KERNEL
    file["layers/dropout/seed_generator/vars/0"] = np.arange(2, dtype="u4")
    file.close()
    model = tmp_path / "model.keras"
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.write(path, "model.weights.h5")
    assert keras_file.looks_like(model.read_bytes()[:64])
    tensors = keras_file.read(str(model))
    assert tensors["Conv1/kernel"].shape == (5, 4, 2, 3)
    assert [keras_file.torchvision_name(name) for name in tensors] == ["features.0.0.weight", None]


def names(container: str) -> list[str]:
    """The variables of the recorded network as ``container`` names them once they're read."""
    return [published_name(name) if container == "published" else name for name in recorded("keras").variants[0].shapes]


@pytest.mark.parametrize("container", ["today", "published"])
def test_names_are_torchvisions(container):
    ours = [name for name in MobileNetV2(0.35).state_dict() if not name.endswith("num_batches_tracked")]
    mapped = list(map(keras_file.torchvision_name, names(container)))
    assert sorted(mapped) == sorted(ours)
    assert mapped == list(map(keras_file.torchvision_name, names("today")))


def test_counted_variables_are_named(file):
    peer = recorded("keras")
    variant = peer.variants[0]
    for number, (place, shape) in enumerate(zip(peer.aliases[".weights.h5"], variant.shapes.values(), strict=True)):
        file[place] = np.full(shape, number, "f4")
    numbers = {name: int(tensor.flatten()[0]) for name, tensor in read(file).items()}
    assert numbers == {name: number for number, name in enumerate(variant.shapes)}


@pytest.mark.parametrize(
    "name",
    [
        "expanded_conv_expand/kernel",
        "block_1_squeeze/kernel",
        "mobl1_conv_2_expand/kernel",
        "dense/kernel",
        "Conv1/scale",
    ],
)
def test_unknown_names_stay(name):
    assert keras_file.torchvision_name(name) == name


def to_elsewhere(file, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["kernel"] = KERNEL
    (tmp_path / "raw").write_bytes(bytes(400))
    return str(tmp_path / "other.h5")


def external_link(file, tmp_path):
    file["Conv_1"] = h5py.ExternalLink(to_elsewhere(file, tmp_path), "/")


def external_model(file, tmp_path):
    file["model_weights"] = h5py.ExternalLink(to_elsewhere(file, tmp_path), "/")


def soft_link(file, tmp_path):
    file["Conv_1"] = h5py.SoftLink("/Conv1")


def virtual(file, tmp_path):
    layout = h5py.VirtualLayout(KERNEL.shape, "f4")
    layout[:] = h5py.VirtualSource(to_elsewhere(file, tmp_path), "kernel", KERNEL.shape)
    file.create_virtual_dataset("Conv_1/kernel", layout)


def external_data(file, tmp_path):
    to_elsewhere(file, tmp_path)
    file.create_dataset("Conv_1/kernel", (100,), "f4", external=[(str(tmp_path / "raw"), 0, 400)])


def never_written(file, tmp_path):
    file.create_dataset("Conv_1/kernel", (10**12,), "f4", chunks=(1000,))


def reference(file, tmp_path):
    file["Conv_1/kernel"] = file["Conv1"].ref


def endless(file, tmp_path):
    file["Conv1/Conv1/Conv1"] = file["Conv1"]


def text(file, tmp_path):
    file["Conv_1/kernel"] = "of another kind"


def without_numbers(file, tmp_path):
    file["Conv_1/kernel"] = h5py.Empty("f4")


def twice(file, tmp_path):
    file["other/Conv1/kernel"] = KERNEL


def lines(file, tmp_path):
    file["a\nb/kernel"] = KERNEL


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (external_link, "'Conv_1' in it is a link"),
        (external_model, "'model_weights' in it is a link"),
        (soft_link, "'Conv_1' in it is a link"),
        (virtual, "Conv_1/kernel are compressed, cut off or in another file"),
        (external_data, "Conv_1/kernel are compressed, cut off or in another file"),
        (never_written, "Conv_1/kernel are compressed, cut off or in another file"),
        (reference, "Conv_1/kernel holds no numbers"),
        (endless, "it holds a group twice"),
        (text, "Conv_1/kernel holds no numbers"),
        (without_numbers, "Conv_1/kernel holds no numbers"),
        (twice, "it holds Conv1/kernel twice"),
        (lines, "isn't printable"),
    ],
)
def test_what_keras_would_not_write_is_refused(tmp_path, file, spoil, words):
    file["Conv1/Conv1/kernel"] = KERNEL
    spoil(file, tmp_path)
    with pytest.raises(ValueError, match=words):
        read(file)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + bytes(200), b"<html>404</html>", None])
def test_what_is_damaged_is_refused_in_one_line(path, file, content):
    file["Conv1/Conv1/kernel"] = KERNEL
    file.close()
    with open(path, "r+b") as damaged:
        whole = damaged.read()
        damaged.seek(0)
        damaged.write(whole[:-100] if content is None else content)
        damaged.truncate()
    with pytest.raises(ValueError, match="open file") as error:
        keras_file.read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("entry", "size"), [("other", 1), ("model.weights.h5", 10**6)])
def test_archives_of_something_else_are_refused(tmp_path, entry, size):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr(entry, bytes(size))
    with pytest.raises(ValueError, match=r"no item named|compressed"):
        keras_file.read(str(path))


def test_without_h5py_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"need h5py \(.*\): pip install 'mnv2\[keras\]'"):
        keras_file.read(path)


def test_files_are_known_by_their_start(path, file):
    file["Conv1/kernel"] = KERNEL
    file.close()
    with open(path, "rb") as written:
        assert keras_file.looks_like(written.read(8))
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    for content in (b"", b"\x89HDF", saved.getvalue()[:64], b"PK\x03\x04" + bytes(60)):
        assert not keras_file.looks_like(content)
