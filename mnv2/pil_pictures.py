"""Pictures as PIL and torchvision prepare them for an evaluation, which the loader is compared with (Pillow).

The steps are torchvision's: a file's pixels in RGB, the short side resized and the centre cropped, a share of 1 for
each 8-bit level, mean and standard deviation. ``caption.require_pillow`` says whether Pillow is there.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .data import Augmentation, Profile

if TYPE_CHECKING:
    from PIL.Image import Image

_CHROMA = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}  # PIL's numbers of a JPEG's samplings
_ORIENTATION = 0x0112  # EXIF's and TIFF's tag


def opened(source: str | IO[bytes]) -> Image:
    """The picture in RGB; what PIL can't decode raises almost any exception."""
    from PIL import Image

    with Image.open(source) as picture:
        return picture.convert("RGB")


def kind(source: str | IO[bytes]) -> str:
    """Format and mode of a file, and what else decoders may differ in, in words; the pixels aren't read."""
    from PIL import Image, JpegImagePlugin

    with Image.open(source) as picture:
        words = [str(picture.format), picture.mode]
        if isinstance(picture, JpegImagePlugin.JpegImageFile):
            words.append(_CHROMA.get(JpegImagePlugin.get_sampling(picture), ""))
            if picture.mode == "CMYK" and "adobe" not in picture.info:
                words.append("without Adobe's marker")
        if ";16" not in picture.mode and any(";16" in str(tile) for tile in picture.tile):
            words.append("of 16 bits")
        if picture.format == "TIFF" and picture.getexif().get(_ORIENTATION, 1) != 1:
            words.append("with an orientation")
        return " ".join(filter(None, words))


def jpeg_library() -> str:
    """What PIL decodes JPEGs with, and its version."""
    from PIL import features

    turbo = features.version("libjpeg_turbo")
    return f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"


def centre(picture: Image, transform: Profile) -> Image:
    """``picture`` in RGB with its short side resized, and of that the centre: R by R pixels."""
    from PIL.Image import Resampling

    short = min(picture.size)
    width, height = (side * transform.shorter // short for side in picture.size)
    picture = picture.resize((width, height), Resampling.BICUBIC if transform.cubic else Resampling.BILINEAR)
    left, top = (round((side - transform.resize) / 2) for side in (width, height))
    return picture.crop((left, top, left + transform.resize, top + transform.resize))


def normalised(picture: Image, transform: Augmentation | Profile) -> NDArray[Any]:
    """``[H, W, 3]`` fp32: shares of 1, less the mean, over the standard deviation."""
    mean, std = (np.divide(values, 255).astype(np.float32) for values in (transform.mean, transform.std))
    return (np.asarray(picture, np.float32) / np.float32(255) - mean) / std
