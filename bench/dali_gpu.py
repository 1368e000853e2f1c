"""The loader's GPU pipeline beside its CPU one: the same pictures in the same order, and nearly the same pixels.

    python -m bench.dali_gpu [--pictures 96] [--resize 224]

JPEGs of several sizes are made up and go through evaluation's preprocessing, whose result doesn't depend on chance, in
both pipelines. Numbers and labels must be equal. JPEG decoders round differently, and a GPU's resize sums in another
order: the mean absolute difference may be one 8-bit level (of one standard deviation's 57), a picture's two.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mnv2.data import IMAGENET_STD, Batch, Loader, profile
from mnv2.distributed import World
from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse

from .figures import check_sizes, device_called
from .pictures import photograph

SIZES = ((500, 375), (375, 500), (640, 480), (333, 251), (300, 300))
MEAN_LEVELS, PICTURE_LEVELS = 1.0, 2.0  # 8-bit levels of mean absolute difference
BATCH = 16


@dataclass(frozen=True)
class DaliConfig:
    """What is compared."""

    pictures: int = option(96, "pictures that are made up")
    resize: int = option(224, "side of the network's input in pixels")
    device: str = option("cuda", "of the pipeline beside the CPU's", choices=("cuda", "cpu"))

    def __post_init__(self) -> None:
        check_sizes(1.0, pictures=self.pictures, resize=self.resize)


def write_pictures(folder: Path, count: int) -> list[str]:
    """JPEGs of made-up photographs of several sizes."""
    paths = []
    for number in range(count):
        paths.append(str(folder / f"{number:04d}.jpg"))
        try:
            picture = photograph(np.random.default_rng(number), SIZES[number % len(SIZES)], 6)
        except ImportError as error:
            raise InputError(f"pictures need pillow ({error}): pip install 'mnv2[bench]'") from None
        picture.save(paths[-1], quality=92)
    return paths


def batches(paths: Sequence[str], resize: int, device: torch.device) -> list[Batch]:
    """All pictures through the pipeline of ``device``, on the CPU."""
    labels = [number % 7 for number in range(len(paths))]
    loader = Loader(paths, labels, profile("torchvision", resize), batch_size=BATCH, world=World(device=device))
    return [Batch(images.float().cpu(), found.cpu(), numbers) for images, found, numbers in loader]


def compare(mine: Sequence[Batch], cpus: Sequence[Batch]) -> list[float]:
    """Mean absolute difference of each picture in 8-bit levels.

    Raises:
        RunError: pictures or labels differ, or pixels by more than decoders may.
    """
    if len(mine) != len(cpus):
        raise RunError(f"the GPU's pipeline gives {len(mine)} batches, the CPU's {len(cpus)}")
    differences: list[float] = []
    for number, (a, b) in enumerate(zip(mine, cpus, strict=True)):
        if not (torch.equal(a.numbers, b.numbers) and torch.equal(a.labels, b.labels)):
            raise RunError(f"batch {number}: the GPU's pipeline gives other pictures or labels than the CPU's")
        levels = (a.images - b.images).abs() * torch.tensor(IMAGENET_STD)[:, None, None]
        differences += levels[b.numbers >= 0].mean((1, 2, 3)).tolist()
    mean, worst = float(np.mean(differences)), int(np.argmax(differences))
    if not (mean <= MEAN_LEVELS and differences[worst] <= PICTURE_LEVELS):
        raise RunError(
            f"the pipelines' pixels differ by {mean:.3f} levels in the mean (at most {MEAN_LEVELS}) and by "
            f"{differences[worst]:.3f} in picture {worst} (at most {PICTURE_LEVELS})"
        )
    return differences


def run(config: DaliConfig) -> None:
    """Compare and tell."""
    device = device_called(config.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), config.pictures)
        found = [batches(paths, config.resize, one) for one in (device, torch.device("cpu"))]
    differences = compare(*found)
    print(
        f"{len(differences)} pictures, labels and order the same on {config.device} and cpu; mean absolute difference "
        f"{np.mean(differences):.3f} 8-bit levels, of the worst picture {max(differences):.3f}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(DaliConfig, argv, "Compare the loader's GPU pipeline with its CPU one.")
    return exit_status("bench.dali_gpu", lambda: run(config))


if __name__ == "__main__":
    sys.exit(main())
