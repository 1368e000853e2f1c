"""Photographs that are made up, for benchmarks of the loader."""

from __future__ import annotations

from typing import Any

import numpy as np


def photograph(generator: np.random.Generator, size: tuple[int, int], noise: float) -> Any:
    """A picture of Pillow's, smooth with ``noise`` levels of noise, as photographs are."""
    from PIL import Image

    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels = pixels + generator.normal(0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
