"""Pictures with words written on them (Pillow)."""

from __future__ import annotations

import io
import os
from typing import Any

from .errors import InputError

try:
    from PIL import Image, ImageDraw, ImageFont

    _ABSENT: ImportError | None = None
except ImportError as error:  # the network and its answers need no Pillow
    _ABSENT = error

_LINES = 20  # as many of them would fill the picture's shorter side
_SMALLEST = 10  # pixels of a line that can still be read


def require_pillow(argument: str) -> None:
    """Raise InputError, in the name of ``argument``, where Pillow is missing."""
    if _ABSENT is not None:
        raise InputError(f"{argument}: needs Pillow ({_ABSENT}): pip install pillow") from _ABSENT


def save_captioned(path: str, words: str, folder: str) -> str:
    """Write the picture at ``path`` with ``words`` in its upper left corner to ``folder``, and return where it is.

    The file is of the kind and base name that it was, with a number where that is taken: nothing is overwritten. A
    name without extension is given one.

    Raises:
        OSError, ValueError: Pillow can't read or write the picture, or the folder can't be written.
    """
    try:
        with Image.open(path) as opened:
            kind = "JPEG" if opened.format == "MPO" else str(opened.format)  # a camera's JPEG with previews
            picture = opened.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    _write(picture, words)
    content = io.BytesIO()
    picture.save(content, kind, quality=95)
    stem, extension = os.path.splitext(os.path.basename(path))
    extension = extension or f".{kind.lower()}"
    place, number = os.path.join(folder, stem + extension), 1
    while True:
        try:
            with open(place, "xb") as file:
                file.write(content.getvalue())
            return place
        except FileExistsError:
            number += 1
            place = os.path.join(folder, f"{stem}_{number}{extension}")


def _write(picture: Any, words: str) -> None:
    size = max(_SMALLEST, min(picture.size) // _LINES)
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(picture)
    margin = size // 3
    text = _wrapped(words, picture.width - 2 * margin, font)
    right, bottom = draw.multiline_textbbox((margin, margin), text, font)[2:]
    draw.rectangle((0, 0, right + margin, bottom + margin), fill="black")
    draw.multiline_text((margin, margin), text, fill="white", font=font)


def _wrapped(words: str, width: int, font: Any) -> str:
    """``words`` in lines that are at most ``width`` pixels wide, but for words that are longer alone."""
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
