"""Checkpoints as MindSpore writes them, byte for byte."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

KINDS = {"float32": "Float32", "float16": "Float16", "int32": "Int32", "int64": "Int64", "bool": "Bool"}


def checkpoint(tensors: Iterable[tuple[str, np.ndarray]], *, crc: bool = False) -> bytes:
    """A checkpoint of ``tensors`` by name, and its checksum behind it."""
    content = b"".join(value(name, array.shape, KINDS[array.dtype.name], array.tobytes()) for name, array in tensors)
    return content + (b"crc_num" + zlib.crc32(content).to_bytes(10, "big")) * crc


def value(name: str, shape: Sequence[int], kind: str, content: bytes) -> bytes:
    """A tensor, or a slice of one."""
    dims = b"".join(b"\x08" + varint(size) for size in shape)
    tensor = dims + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, name.encode()) + field(2, tensor))


def field(number: int, content: bytes) -> bytes:
    """A text, or a message in a message."""
    return varint(8 * number + 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    groups = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])
