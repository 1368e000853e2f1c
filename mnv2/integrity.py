"""Is a file a whole picture of a kind that the loader decodes? Answered from its structure, without decoding it.

A JPEG is walked from marker to marker and must end (ITU T.81, annex B), every chunk of a PNG must match its checksum
(RFC 2083), and a file of another kind must be as long as it says. What can't be seen this way, such as a JPEG whose
compressed data is wrong but complete, isn't found; most decoders don't find it either.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

_START_OF_SCAN = 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_DECODED_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended sequential and progressive, all Huffman-coded
_END_OF_IMAGE = b"\xff\xd9"
_TAIL = 4096
_TIFF_STRIPS = (273, 279)  # tags of the offsets and of the lengths
_TIFF_TILES = (324, 325)
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM_HEADER = (
    re.compile(rb"P[56]" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s"),
    re.compile(rb"P4" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s"),
)


def fault(path: str) -> str | None:
    """What is wrong with the file at ``path`` as a picture ("is empty", "is a truncated JPEG", ...), or None."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            return "is no regular file"
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return "is empty"
            start = file.read(16)
            for magic, check in _KINDS:
                if start.startswith(magic):
                    return check(file, start, size)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "is not a picture that can be decoded"


def _jpeg(file: BinaryIO, start: bytes, size: int) -> str | None:
    file.seek(2)
    framed = False
    while True:
        segment = file.read(4)
        if len(segment) < 4:
            return "is a truncated JPEG"
        if segment[0] != 0xFF:
            return "is a JPEG with a damaged header"
        code = segment[1]
        if code == 0xFF:  # a fill byte before the marker
            file.seek(-3, os.SEEK_CUR)
            continue
        length = int.from_bytes(segment[2:], "big")
        if code in _FRAMES:
            frame = file.read(6)
            if code not in _DECODED_FRAMES or frame[:1] != b"\x08":
                return "is a JPEG of a kind that isn't decoded (not 8-bit Huffman-coded)"
            if length < 8 or 0 in (int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")):
                return "is a JPEG with a damaged header"
            framed = True
            length -= 6
        file.seek(length - 2, os.SEEK_CUR)
        if code == _START_OF_SCAN:
            break
    if not framed:
        return "is a JPEG with a damaged header"
    # Inside compressed data FF is always followed by 00 or a restart marker, so the end marker can't occur by chance.
    data = file.tell()
    file.seek(max(data, size - _TAIL))
    if _END_OF_IMAGE in file.read():
        return None
    file.seek(data)
    return None if _END_OF_IMAGE in file.read() else "is a truncated JPEG"


def _png(file: BinaryIO, start: bytes, size: int) -> str | None:
    file.seek(8)
    while True:
        header = file.read(8)
        if len(header) < 8:
            return "is a truncated PNG"
        length = int.from_bytes(header[:4], "big")
        if length + 4 > size:
            return "is a truncated PNG"
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            return "is a truncated PNG"
        if zlib.crc32(header[4:] + data) != int.from_bytes(checksum, "big"):
            return "is a PNG whose data doesn't match its checksum"
        if header[4:] == b"IEND":
            return None


def _webp(file: BinaryIO, start: bytes, size: int) -> str | None:
    if start[8:12] != b"WEBP":
        return "is not a picture that can be decoded"
    return "is a truncated WebP" if size < int.from_bytes(start[4:8], "little") + 8 else None


def _bmp(file: BinaryIO, start: bytes, size: int) -> str | None:
    file.seek(10)
    header = file.read(24)
    if len(header) < 24:
        return "is a truncated BMP"
    offset, _, width, height, _, bits, compression = struct.unpack("<IIiiHHI", header)
    length = int.from_bytes(start[2:6], "little")
    if compression == 0:  # the length that the header tells may be 0
        length = max(length, offset + (width * bits + 31) // 32 * 4 * abs(height))
    return "is a truncated BMP" if size < length else None


def _jpeg2000(file: BinaryIO, start: bytes, size: int) -> str | None:
    file.seek(max(0, size - _TAIL))
    return None if _END_OF_IMAGE in file.read() else "is a truncated JPEG 2000"


def _pnm(file: BinaryIO, start: bytes, size: int) -> str | None:
    kind = start[1] - ord("0")
    if kind < 4:  # numbers written as text: no length to hold it to
        return None
    file.seek(0)
    header = _PNM_HEADER[kind == 4].match(file.read(_TAIL))
    if header is None:
        return "is a PNM with a damaged header"
    width, height, *maximum = map(int, header.groups())
    if maximum not in ([], [255], [65535]):  # the decoder doesn't scale other ranges
        return "is a PNM of a kind that isn't decoded (its maximum is neither 255 nor 65535)"
    row = -(-width // 8) if kind == 4 else width * (3 if kind == 6 else 1) * (2 if maximum[0] > 255 else 1)
    return "is a truncated PNM" if size < header.end() + row * height else None


def _tiff(file: BinaryIO, start: bytes, size: int) -> str | None:
    order = "<" if start[:2] == b"II" else ">"
    try:
        file.seek(struct.unpack(order + "I", start[4:8])[0])
        (entries,) = struct.unpack(order + "H", file.read(2))
        tags = {}
        for tag, kind, count, value in struct.iter_unpack(order + "HHI4s", file.read(12 * entries)):
            tags[tag] = (kind, count, value)
        bits = _tiff_numbers(file, order, *tags[258]) if 258 in tags else (1,)
        formats = _tiff_numbers(file, order, *tags[339]) if 339 in tags else (1,)
        if not {*bits} <= {8, 16} or {*formats} != {1}:
            return "is a TIFF of a kind that isn't decoded (not of 8 or 16-bit unsigned integers)"
        for offsets, lengths in (_TIFF_STRIPS, _TIFF_TILES):
            if offsets in tags and lengths in tags:
                parts = zip(*(_tiff_numbers(file, order, *tags[tag]) for tag in (offsets, lengths)), strict=True)
                return "is a truncated TIFF" if any(sum(part) > size for part in parts) else None
    except (struct.error, ValueError):
        return "is a truncated TIFF"
    return "is a TIFF without picture data"


def _tiff_numbers(file: BinaryIO, order: str, kind: int, count: int, value: bytes) -> tuple[int, ...]:
    letter, width = ("H", 2) if kind == 3 else ("I", 4)
    if count * width > 4:
        file.seek(struct.unpack(order + "I", value)[0])
        value = file.read(count * width)
    return struct.unpack(f"{order}{count}{letter}", value[: count * width])


_KINDS: tuple[tuple[bytes | tuple[bytes, ...], Callable[[BinaryIO, bytes, int], str | None]], ...] = (
    (b"\xff\xd8", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"RIFF", _webp),
    (b"BM", _bmp),
    ((b"II*\0", b"MM\0*"), _tiff),
    (tuple(b"P%d" % kind for kind in range(1, 7)), _pnm),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _jpeg2000),
)
