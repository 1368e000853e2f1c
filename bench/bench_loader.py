"""The loader beside a PIL ``DataLoader`` that does the same with as many workers: pictures a second, CPU seconds each.

    pytest bench/bench_loader.py -s [--record]

Rounds alternate, an epoch of one and an epoch of the other, so that both meet the same machine. Each round starts from
nothing, threads or processes too: a loader that lives on has its first batches ready before the clock runs. Pictures
are made up, 500 by 375 pixels, of about ImageNet's mean size in bytes, and lie in the page cache.
"""

from __future__ import annotations

import math
import os
import random
import resource
import time
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2.data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Loader, Profile, profile
from mnv2.distributed import World

FILES = 512
PICTURES = 4 * FILES  # each file four times an epoch, so that starting up weighs little
BATCH = 64
RESIZE = 224
ROUNDS = 5
THREADS = len(os.sched_getaffinity(0))
TRANSFORMS = {"evaluation": profile("torchvision", RESIZE), "training": Augmentation(RESIZE)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = []
    for number in range(FILES):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
        pixels = pixels + generator.normal(0, 14, pixels.shape)
        paths.append(str(folder / f"{number:04d}.jpg"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths * (PICTURES // FILES)


class PilDataset(torch.utils.data.Dataset):
    """What torchvision's folder, transforms and normalisation do, with PIL and numpy, as NHWC."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform
        self.mean = np.asarray(IMAGENET_MEAN, np.float32)
        self.std = np.asarray(IMAGENET_STD, np.float32)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        with Image.open(self.paths[number]) as file:
            picture = file.convert("RGB")
        if isinstance(self.transform, Profile):
            picture = centre(picture, self.transform)
        else:
            picture = random_crop(picture, self.transform)
        return (np.asarray(picture, np.float32) - self.mean) / self.std, number


def centre(picture, transform):
    short, crop = min(picture.size), transform.resize
    sides = [side * transform.shorter // short for side in picture.size]
    picture = picture.resize(sides, Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in sides)
    return picture.crop((left, top, left + crop, top + crop))


def random_crop(picture, transform):
    width, height = picture.size
    low, high = map(math.log, transform.ratio)
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * random.uniform(*transform.scale)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    picture = picture.crop(box).resize((transform.resize, transform.resize), Image.Resampling.BILINEAR)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < transform.hflip else picture


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(epoch) -> tuple[float, float]:
    """Wall and CPU seconds of an epoch."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    epoch()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def assert_parity(ours, theirs, kind):
    """The same pictures in the same layout; in evaluation the same pixels, to a third of an 8-bit level."""
    batch, (pixels, numbers) = next(iter(ours)), next(iter(theirs))
    images = pixels.permute(0, 3, 1, 2)
    assert batch.images.shape == images.shape
    assert batch.images.dtype == images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    if kind == "evaluation":
        assert torch.equal(batch.numbers, numbers)
        assert (batch.images - images).abs().mean() * np.mean(IMAGENET_STD) < 0.33


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_loader(benchmark, record, paths, kind):
    transform = TRANSFORMS[kind]

    def ours():
        labels = range(len(paths))
        return Loader(paths, labels, transform, batch_size=BATCH, world=World(), threads=THREADS)

    def theirs():
        dataset = PilDataset(paths, transform)
        return torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=kind == "training", drop_last=True, num_workers=THREADS
        )

    def epoch(loader):
        assert sum(1 for _ in loader()) == PICTURES // BATCH

    assert_parity(ours(), theirs(), kind)
    their_rounds, our_rounds = [], []
    benchmark.pedantic(
        lambda: our_rounds.append(measured(lambda: epoch(ours))),
        setup=lambda: their_rounds.append(measured(lambda: epoch(theirs))),
        rounds=ROUNDS,
    )
    wall = [their / our for (their, _), (our, _) in zip(their_rounds, our_rounds, strict=True)]
    cpu = [their / our for (_, their), (_, our) in zip(their_rounds, our_rounds, strict=True)]
    row = {
        "case": f"{kind}, {THREADS} workers, {RESIZE} px",
        "ours_pictures_per_second": round(PICTURES / median(wall for wall, _ in our_rounds), 1),
        "pil_pictures_per_second": round(PICTURES / median(wall for wall, _ in their_rounds), 1),
        "ours_cpu_milliseconds_per_picture": round(median(cpu for _, cpu in our_rounds) / PICTURES * 1000, 3),
        "pil_cpu_milliseconds_per_picture": round(median(cpu for _, cpu in their_rounds) / PICTURES * 1000, 3),
        "speed_ratio_min_median_max": [round(value, 2) for value in (min(wall), median(wall), max(wall))],
        "cpu_ratio_min_median_max": [round(value, 2) for value in (min(cpu), median(cpu), max(cpu))],
    }
    benchmark.extra_info.update(row)
    record("loader", row)
