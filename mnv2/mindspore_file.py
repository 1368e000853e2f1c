"""Reading MindSpore's checkpoints, and the names that its MobileNetV2s have in them.

A checkpoint is a protobuf message. What is needed of it is decoded here; what isn't known is passed over:

    Checkpoint   1: Value, one for each tensor, or one for each slice of a large tensor
    Value        1: tag, the name      2: TensorProto      3: MapTensorProto
    TensorProto  1: dims               2: type             3: content, little-endian

Behind it newer versions may write "crc_num" and the message's CRC-32.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

_ENCRYPTED = b"^:\x7f"  # behind a byte that says how
_CRC, _CRC_BYTES = b"crc_num", 10
_MAX_NAME, _MAX_DIMS = 500, 8
_TYPES = {
    "Bool": torch.bool,
    "Int8": torch.int8,
    "UInt8": torch.uint8,
    "Int16": torch.int16,
    "UInt16": torch.uint16,
    "Int32": torch.int32,
    "UInt32": torch.uint32,
    "Int64": torch.int64,
    "UInt64": torch.uint64,
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
}


class _Slice(NamedTuple):
    """A tensor's name, shape and type, and its content or a part of it."""

    name: str
    shape: tuple[int, ...]
    kind: str
    content: memoryview


def looks_like(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a MindSpore checkpoint; from about 100 on they tell it safely."""
    if start[1:4] == _ENCRYPTED:
        return True
    sizes, at = [], 0
    try:
        for _ in range(2):  # of the first value and of its name
            if start[at : at + 1] != b"\n":
                return False
            size, at = _varint(memoryview(start), at + 1)
            sizes.append(size)
    except ValueError:
        return False
    name, rest = start[at : at + sizes[1]], start[at + sizes[1] :]
    # A graph of TensorFlow starts likewise, but with the text of an operation where the fields of a tensor would be.
    return (
        sizes[1] + 2 < sizes[0]
        and re.fullmatch(rb"[\w./:-]+", name) is not None
        and re.match(rb"\Z|\x1a|\x12[\x80-\xff]*([\x00-\x7f][\x08\x0a\x12]|[\x00-\x7f]?\Z)", rest) is not None
    )


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by MindSpore's names, in the file's order and types; texts in it are passed over.

    Raises:
        ValueError: the file is encrypted, damaged or no checkpoint; the message is one line without the path.
    """
    with open(path, "rb") as file:
        content = memoryview(file.read())
    if content[1:4] == _ENCRYPTED:
        raise ValueError("it is encrypted: load it in MindSpore with its key and save it without one")
    tensors: dict[str, Tensor] = {}
    for name, group in groupby(_slices(_checked(content)), key=lambda part: part.name):
        if name in tensors:
            raise ValueError(f"it holds {name} twice")
        tensor = _joined(name, list(group))
        if tensor is not None:
            tensors[name] = tensor
    if not tensors:
        raise ValueError("it holds no tensor")
    return tensors


def _checked(content: memoryview) -> memoryview:
    """``content`` without its checksum, which must be right where there is one."""
    end = len(content) - _CRC_BYTES
    message = content[: max(0, end - len(_CRC))]
    if content[len(message) : end] != _CRC:
        return content
    if int.from_bytes(content[end:], "big") != zlib.crc32(message):
        raise ValueError("its checksum is wrong")
    return message


def _slices(checkpoint: memoryview) -> Iterator[_Slice]:
    """What each value of a checkpoint holds."""
    for number, value in _fields(checkpoint):
        if number == 1 and isinstance(value, memoryview):
            fields = dict(_fields(value))
            name = _text(fields.get(1))
            tensor = fields.get(2)
            if not isinstance(tensor, memoryview):
                raise ValueError(f"{name} is no tensor" + (" but a map, which no layer has" if 3 in fields else ""))
            yield _slice(name, tensor)


def _slice(name: str, tensor: memoryview) -> _Slice:
    shape: list[int] = []
    kind, content = "", None
    for number, value in _fields(tensor):
        if number == 1:
            shape += _numbers(value)
        elif number == 2:
            kind = _text(value)
        elif number == 3 and isinstance(value, memoryview):
            content = value
    if content is None:
        raise ValueError(f"{name} has no content")
    if shape == [0] and kind != "str":  # so MindSpore writes a scalar
        shape = []
    return _Slice(name, tuple(shape), kind, content)


def _joined(name: str, slices: Sequence[_Slice]) -> Tensor | None:
    """The tensor that consists of ``slices``, or None for a text."""
    _, shape, kind, _ = slices[0]
    if any((part.shape, part.kind) != (shape, kind) for part in slices):
        raise ValueError(f"the slices of {name} have different shapes or types")
    if kind == "str":
        return None
    dtype = _TYPES.get(kind)
    if dtype is None:
        raise ValueError(f"{name} is of a type that isn't known, {kind}")
    if len(shape) > _MAX_DIMS or not all(0 < size < 2**31 for size in shape):
        raise ValueError(f"{name} has an impossible shape")
    wanted, there = math.prod(shape) * dtype.itemsize, sum(len(part.content) for part in slices)
    if wanted != there:
        raise ValueError(f"{name} has {there} bytes, but {shape} of {kind} are {wanted}")
    return torch.frombuffer(bytearray().join(part.content for part in slices), dtype=dtype).reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message: an integer, or the bytes of a text, a message or a list."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0 or kind not in (0, 1, 2, 5):
            raise ValueError("it is damaged, or no checkpoint of MindSpore")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size, at = _varint(message, at)
        if size > len(message) - at:
            raise ValueError("it is cut off, or no checkpoint of MindSpore")
        if kind == 2:
            yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number of seven bits a byte at ``at``, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise ValueError("it is cut off, or no checkpoint of MindSpore")
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError("it is damaged, or no checkpoint of MindSpore")


def _numbers(value: int | memoryview) -> list[int]:
    """One number, or a list that is packed into bytes."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _text(value: int | memoryview | None) -> str:
    """A name of one printable line."""
    if isinstance(value, memoryview) and 0 < len(value) <= _MAX_NAME:
        text = bytes(value).decode("utf-8", "replace")
        if text.isprintable() and "\ufffd" not in text:
            return text
    raise ValueError("a name in it is missing or no text")


_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_CLASSIFIER = re.compile(r"head\.classifier|(head\.)?dense|head\.(head\.)?[12]|classifier\.1")
_MODEL_ZOO = re.compile(
    r"(?:backbone\.)?(?:features\.)?(\d{1,2})\.(?:(conv\.\d)(?:\.features(\.[01]))?|features\.([01]))"
)
_MINDCV_BLOCK = re.compile(r"features\.(\d{1,2})\.layers\.(\d)")
_MINDCV_ENDS = {
    "features.0": "features.0.0",
    "features.1": "features.0.1",
    "features.20": "features.18.0",
    "features.21": "features.18.1",
}


def torchvision_name(name: str) -> str | None:
    """The name in torchvision of MindSpore's tensor ``name``: None for no weight, ``name`` where it isn't known.

    Known are the networks of MindSpore Vision (``mindvision``), of the model zoo and of MindCV. No weights are the
    values of a training loop, whose names have no module, and an optimizer's copies of weights, behind a prefix.
    """
    behind = name.partition(".")[2]
    return _known(name) or (name if behind and not _known(behind) else None)


def _known(name: str) -> str | None:
    """The name in torchvision of a weight or of a statistic."""
    module, _, leaf = name.rpartition(".")
    ours = _module(module)
    return f"{ours}.{_LEAVES[leaf]}" if ours and leaf in _LEAVES else None


def _module(name: str) -> str | None:
    """The name in torchvision of a module with weights."""
    if _CLASSIFIER.fullmatch(name):
        return "classifier.1"
    if name in _MINDCV_ENDS:
        return _MINDCV_ENDS[name]
    if match := _MINDCV_BLOCK.fullmatch(name):
        # Convolution, norm and activation of one layer after another; the last layer has no activation.
        block = int(match[1]) - 2
        layer, step = divmod(int(match[2]), 3)
        last = layer == (1 if block == 1 else 2)
        return f"features.{block}.conv.{layer + step if last else f'{layer}.{step}'}"
    if match := _MODEL_ZOO.fullmatch(name):
        number, conv, part, end = match.groups()
        return f"features.{number}.{conv}{part or ''}" if conv else f"features.{number}.{end}"
    return None


def torchvision_tensor(name: str, tensor: Tensor) -> Tensor:
    """``tensor``, whose name in torchvision is ``name``, in torchvision's shape.

    MindSpore Vision classifies by a 1x1 convolution, and old versions on Ascend keep depthwise weights as
    [1, C, 3, 3].
    """
    if name == "classifier.1.weight" and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    if re.fullmatch(r"features\.\d+\.conv\.[01]\.0\.weight", name) and tensor.dim() == 4 and len(tensor) == 1:
        return tensor.transpose(0, 1)
    return tensor
