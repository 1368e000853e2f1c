from __future__ import annotations

import io
import os
import struct
import zlib

import pytest
from samples import photo

from mnv2.integrity import fault


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture = photo(5, 120, 80)
    picture.convert(options.pop("mode", "RGB")).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE = {
    "jpeg": encoded("JPEG"),
    "jpeg-progressive": encoded("JPEG", progressive=True),
    "jpeg-grey": encoded("JPEG", mode="L"),
    "jpeg-cmyk": encoded("JPEG", mode="CMYK"),
    "jpeg-with-exif": encoded("JPEG", exif=b"Exif\0\0" + b"\xff\xd9" * 50),
    "png": encoded("PNG"),
    "png-palette": encoded("PNG", mode="P"),
    "bmp": encoded("BMP"),
    "webp": encoded("WEBP"),
    "tiff": encoded("TIFF"),
    "ppm": encoded("PPM"),
    "pgm": encoded("PPM", mode="L"),
    "pbm": encoded("PPM", mode="1"),
    "jp2": encoded("JPEG2000"),
}


def check(tmp_path, data: bytes) -> str | None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    return fault(str(path))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_picture_passes(tmp_path, kind):
    assert check(tmp_path, WHOLE[kind]) is None


@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_picture_is_found(tmp_path, kind):
    data = WHOLE[kind]
    cuts = [*range(1, 40), *(int(len(data) * share) for share in (0.02, 0.5, 0.9)), len(data) - 1]
    for cut in cuts:
        assert check(tmp_path, data[:cut]) is not None, cut


def test_a_bmp_that_doesnt_tell_its_length_is_measured(tmp_path):
    data = WHOLE["bmp"][:2] + bytes(4) + WHOLE["bmp"][6:]
    assert check(tmp_path, data) is None
    assert check(tmp_path, data[:-1]) == "is a truncated BMP"


@pytest.mark.parametrize(
    "data",
    [encoded("TIFF", mode="1"), encoded("TIFF", mode="F"), encoded("TIFF", mode="I"), b"P5 2 2 15\n" + bytes(4)],
    ids=["tiff-1-bit", "tiff-float", "tiff-int32", "pnm-of-4-bits"],
)
def test_a_kind_that_the_decoder_gets_wrong_is_refused(tmp_path, data):
    assert "of a kind that isn't decoded" in check(tmp_path, data)


def test_data_after_the_end_is_no_fault(tmp_path):
    for kind, data in WHOLE.items():
        for extra in (b"\0" * 10, b"\0" * 100_000):
            if kind != "jp2" or len(extra) < 100:
                assert check(tmp_path, data + extra) is None, (kind, len(extra))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is not a picture that can be decoded"),
        (os.urandom(4000).replace(b"\xff\xd8", b"..").replace(b"BM", b".."), "is not a picture that can be decoded"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "is not a picture that can be decoded"),
        (encoded("GIF"), "is not a picture that can be decoded"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "is not a picture that can be decoded"),
        (b"\xff\xd8" + bytes(100), "is a JPEG with a damaged header"),
        (b"\xff\xd8\xff\xd9", "is a truncated JPEG"),
    ],
    ids=["empty", "html", "random", "apple-double", "gif", "wave", "jpeg-of-zeros", "jpeg-of-nothing"],
)
def test_what_is_no_picture_is_named(tmp_path, data, words):
    assert check(tmp_path, data) == words


def frame(data: bytes, **changes) -> bytes:
    """``data``, a baseline JPEG, with fields of its frame header replaced."""
    at = data.index(b"\xff\xc0")
    code, length, precision, height, width = struct.unpack(">BHBHH", data[at + 1 : at + 9])
    fields = {"code": code, "length": length, "precision": precision, "height": height, "width": width} | changes
    return data[: at + 1] + struct.pack(">BHBHH", *fields.values()) + data[at + 9 :]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code": 0xC3}, "of a kind that isn't decoded"),
        ({"code": 0xC9}, "of a kind that isn't decoded"),
        ({"precision": 12}, "of a kind that isn't decoded"),
        ({"height": 0}, "damaged header"),
        ({"width": 0}, "damaged header"),
    ],
    ids=["lossless", "arithmetic", "12-bit", "no-height", "no-width"],
)
def test_a_jpeg_that_cant_be_decoded_is_found(tmp_path, changes, words):
    assert words in check(tmp_path, frame(WHOLE["jpeg"], **changes))


def test_a_png_with_a_wrong_byte_is_found(tmp_path):
    data = bytearray(WHOLE["png"])
    data[len(data) // 2] ^= 1
    assert check(tmp_path, bytes(data)) == "is a PNG whose data doesn't match its checksum"


def test_a_png_chunk_longer_than_the_file_is_found(tmp_path):
    chunk = struct.pack(">I", 2**31) + b"IDAT"
    assert check(tmp_path, WHOLE["png"][:33] + chunk + zlib.compress(b"x")) == "is a truncated PNG"


def test_what_cant_be_read_is_named(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert fault(str(tmp_path / "dangling.jpg")) == "can't be read: No such file or directory"
    assert fault(str(tmp_path / "folder.jpg")) == "is no regular file"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert fault(str(tmp_path / "pipe.jpg")) == "is no regular file"
