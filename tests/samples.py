"""Made-up inputs for tests: photographs on disk, and networks whose logits mean something."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mnv2 import MobileNetV2
from mnv2.layouts import LAYOUTS
from mnv2.trainer import weights_of


def settled(model: MobileNetV2, resize: int = 32) -> MobileNetV2:
    """``model`` in eval mode with running statistics that fit its weights.

    As initialised, a network in eval mode shrinks its input to logits of 1e-9, where any two results look alike.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(torch.randn(16, 3, resize, resize, generator=torch.Generator().manual_seed(1)))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def photo(seed: int, width: int, height: int) -> Image.Image:
    """A smooth coloured picture with some noise, different for every seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 60
    phases = generator.uniform(0, 6, (3, 2))
    waves = [128 + 60 * np.sin(x * (c + 1) + phases[c, 0]) + 50 * np.cos(y * (c + 1) + phases[c, 1]) for c in range(3)]
    pixels = np.stack(waves, -1) + generator.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


SIZES = ((96, 64), (50, 90), (64, 64), (131, 77), (40, 41))
CLASSES = ("ant", "bee", "cat")
SMALL = ["--alpha", "0.35", "--resize", "32", "--device", "cpu"]  # flags of what the fixture ``weights`` is of


def write_photos(folder: Path, count: int, classes=CLASSES, start: int = 0) -> list[Path]:
    """``count`` JPEGs of several sizes, dealt out to class folders; returned in the order of their paths."""
    paths = []
    for number in range(count):
        place = folder / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[number % len(SIZES)]
        paths.append(place / f"{number:03d}.jpg")
        photo(start + number, width, height).save(paths[-1], quality=92)
    return sorted(paths)


def write_undecodable(path: Path) -> None:
    """A PNG that looks whole, checksums too, but whose data no decoder takes."""
    photo(1, 60, 60).save(path)
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(100)  # inside the first chunk of data, whose checksum is made right again
    length = int.from_bytes(content[33:37], "big")
    content[41 + length : 45 + length] = zlib.crc32(content[37 : 41 + length]).to_bytes(4, "big")
    path.write_bytes(content)


def save_weights(path: Path | str, model: MobileNetV2, classes: list[str] | None, **config) -> None:
    """What `validate.py` and ``--pretrained`` read of a checkpoint."""
    torch.save({"model": weights_of(model), "classes": classes, "config": config}, path)


def in_layout(state, source):
    """``state`` by the names of the layout called ``source``."""
    layout = next(layout for layout in LAYOUTS if layout.source == source)
    return {layout.own_name(name): tensor.contiguous() for name, tensor in state.items()}


def steady(output: str) -> list[str]:
    """The lines of an evaluation without its speed."""
    return [re.sub(r", [\d.]+ pictures a second", "", line) for line in output.splitlines()]
