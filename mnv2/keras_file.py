"""Reading Keras's files of weights, which are HDF5, and the names that its MobileNetV2 has in them.

A file of weights has its tensors by layer, `Conv1/Conv1/kernel:0`, and a saved model the same under `model_weights/`
(the ending `:0` is older Keras's). Keras 3's `.weights.h5` counts the layers of each class and their variables,
`layers/conv2d_3/vars/0`; its `.keras` is an archive with such a file in it. The layers' own names, which newer versions
write beside them, aren't read: they are texts of variable length, with which a damaged file can make HDF5 crash.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import InputError
from .model import BLOCKS

_START = b"\x89HDF\r\n\x1a\n"
_ARCHIVE_START, _ARCHIVE_FIRST = b"PK\x03\x04", b"metadata.json"
_ARCHIVED = "model.weights.h5"
# Variables of each class of layers in the order of `.weights.h5`.
_VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
_STEPS = ("expand", "depthwise", "project")


def looks_like(start: bytes) -> bool:
    """Whether a file that starts with these bytes, 43 or more, is HDF5 or an archive of Keras."""
    archive = start.startswith(_ARCHIVE_START) and start[30:].startswith(_ARCHIVE_FIRST)
    return start.startswith(_START) or archive


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file by layer and variable, such as ``Conv1/kernel``, in torch's order of dimensions.

    That is [out, in, H, W] for a convolution, [C, 1, H, W] for a depthwise one and [out, in] for a dense layer. Nothing
    outside the file is read, whatever it links to.

    Raises:
        InputError: h5py isn't installed.
        ValueError: the file is damaged, or isn't as Keras writes it; the message is one line without the path.
    """
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"Keras's files need h5py ({error}): pip install 'mnv2[keras]'") from None
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file, h5py.File(_weights(file, size), "r") as content:
            return _tensors(content, size)
    except Exception as error:  # a damaged file can fail anywhere in its reader
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _weights(file: BinaryIO, size: int) -> BinaryIO:
    """The HDF5 file that ``file`` of ``size`` bytes is or has in it."""
    archived = file.read(len(_ARCHIVE_START)) == _ARCHIVE_START
    file.seek(0)
    if not archived:
        return file
    archive = zipfile.ZipFile(file)
    if archive.getinfo(_ARCHIVED).file_size > size:
        raise ValueError("its weights are compressed")
    return io.BytesIO(archive.read(_ARCHIVED))


def _tensors(file: Any, left: int) -> dict[str, Tensor]:
    """The tensors of an open file, which can't take more than ``left`` bytes, as Keras compresses nothing."""
    tensors: dict[str, Tensor] = {}
    for place, dataset in _datasets(_inner(file, "model_weights") or _inner(file, "layers") or file, (), set()):
        name = _name(place)
        if dataset.shape is None or dataset.dtype.kind not in "fiu":
            raise ValueError(f"{name} holds no numbers")
        left -= dataset.nbytes
        if dataset.is_virtual or dataset.external or left < 0:
            raise ValueError(f"the numbers of {name} are compressed, cut off or in another file")
        if name in tensors:
            raise ValueError(f"it holds {name} twice")
        array = dataset[()]
        tensors[name] = _torch_order(name, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))
    if not tensors:
        raise ValueError("it holds no weights")
    return tensors


def _inner(group: Any, name: str) -> Any:
    """What is called ``name`` in ``group`` itself, None where nothing is."""
    import h5py

    link = group.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):  # which h5py would follow, into other files too
        raise ValueError(f"{name!a} in it is a link")
    return group[name]


def _datasets(group: Any, place: tuple[str, ...], seen: set[Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The datasets in and below ``group``, and the names on the way to them; ``seen`` are the groups so far."""
    import h5py

    if group in seen:
        raise ValueError("it holds a group twice")
    seen.add(group)
    for name in group:
        item = _inner(group, name)
        if isinstance(item, h5py.Group):
            yield from _datasets(item, (*place, name), seen)
        elif isinstance(item, h5py.Dataset):
            yield (*place, name), item


def _name(place: tuple[str, ...]) -> str:
    """Layer and variable of the dataset at ``place``."""
    if not all(name.isprintable() for name in place):
        raise ValueError("a name in it isn't printable")
    if len(place) > 2 and place[-2] == "vars":
        return _counted_name(place[-3], place[-1])
    # A model inside another one is a layer, whose layers come next; otherwise the scope of a variable, which comes
    # next, can have been counted up.
    layer = place[0] if _module(place[0]) else place[max(0, len(place) - 2)]
    return f"{layer}/{place[-1].removesuffix(':0')}"


def _counted_name(counted: str, variable: str) -> str:
    """Layer and variable by their places in the network, as the ``counted`` one of a class, "conv2d_3", and "0"."""
    kind, _, count = counted.rpartition("_")
    if not count.isdecimal():  # the first one
        kind, count = counted, "0"
    variables = dict(zip("0123", _VARIABLES.get(kind, ()), strict=False))
    if variable not in variables:
        return f"{counted}/{variable}"
    return f"{dict(enumerate(_layers(kind))).get(int(count), counted)}/{variables[variable]}"


def _layers(kind: str) -> list[str]:
    """The network's layers of one class in their order."""
    blocks = sum(repeats for _, _, repeats, _ in BLOCKS)
    stages = [("Conv1", "bn_Conv1")]
    for number in range(blocks):
        prefix = f"block_{number}" if number else "expanded_conv"
        stages += [(f"{prefix}_{step}", f"{prefix}_{step}_BN") for step in _STEPS[number == 0 :]]
    stages.append(("Conv_1", "Conv_1_bn"))
    convolutions, norms = zip(*stages, strict=True)
    return {
        "conv2d": [name for name in convolutions if not name.endswith("depthwise")],
        "depthwise_conv2d": [name for name in convolutions if name.endswith("depthwise")],
        "batch_normalization": list(norms),
        "dense": ["predictions"],
    }[kind]


def _torch_order(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` with its output's channels first."""
    layer, _, variable = name.partition("/")
    if variable in ("kernel", "depthwise_kernel") and tensor.dim() == 4:
        if "depthwise" in layer:  # [H, W, C, multiplier], and Keras 3 calls it a kernel too
            tensor = tensor.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1)
        else:  # [H, W, in, out]
            tensor = tensor.permute(3, 2, 0, 1)
    elif variable == "kernel" and tensor.dim() == 2:  # [in, out]
        tensor = tensor.t()
    return tensor.contiguous()


_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_ENDS = {
    "Conv1": "features.0.0",
    "bn_Conv1": "features.0.1",
    "Conv_1": "features.18.0",
    "Conv_1_bn": "features.18.1",
    "predictions": "classifier.1",
    "Logits": "classifier.1",
}
# Of keras.applications today, and of the files that it downloads, which are older than its names.
_BLOCK = re.compile(r"(?:expanded_conv|block_(?P<number>\d{1,2}))_(?P<step>[a-z]+)(?P<norm>_BN)?")
_OLD_BLOCK = re.compile(r"(?:mobl|(?P<norm>bn))(?P<number>\d{1,2})_conv_(?P=number)_(?(norm)bn_)(?P<step>[a-z]+)")


def torchvision_name(name: str) -> str | None:
    """The name in torchvision of ``read``'s ``name``: None for no weight, ``name`` where it isn't known."""
    layer, _, variable = name.rpartition("/")
    if "seed_generator" in name:  # of dropout
        return None
    module = _module(layer)
    return f"{module}.{_LEAVES[variable]}" if module and variable in _LEAVES else name


def _module(layer: str) -> str | None:
    """The name in torchvision of a layer with weights."""
    match = _BLOCK.fullmatch(layer) or _OLD_BLOCK.fullmatch(layer)
    if match is None:
        return _ENDS.get(layer)
    number, norm = int(match["number"] or 0), int(match["norm"] is not None)
    steps = _STEPS[number == 0 :]
    if match["step"] not in steps:
        return None
    step = steps.index(match["step"])
    last = step == len(steps) - 1  # which has no activation, and so is no module of its own in torchvision
    return f"features.{number + 1}.conv.{step + norm if last else f'{step}.{norm}'}"
