"""The loader beside a PIL ``DataLoader`` that does the same with as many workers, whole and stage by stage.

    pytest bench/bench_loader.py -s [--record]

Whole: an epoch, in pictures a second and in CPU seconds of all threads and processes. Stages, in CPU milliseconds a
picture:

decode      ours: DALI's pipeline cut after its decoder, reading included; in training it decodes the crop alone.
            PIL's: ``Image.open`` and ``convert`` of each file, one after the other.
resize      resize, crop, mirror and normalisation to fp32: the whole pipeline, or all that the data set does with a
            picture, less decode.
hand-over   what it takes for torch to have batches: the whole loader less its pipeline (for PIL, worker processes,
            collating and sending).

What is a difference may be less than the noise of what it is between: a stage of which a round says that it took no
time has no ratio, and is named ``under_noise``.

Sides alternate, so that all meet the same machine. Each round starts from nothing, threads or processes too: a loader
that lives on has its first batches ready before the clock runs. Pictures are made up, 500 by 375 pixels, of about
ImageNet's mean size in bytes, and lie in the page cache.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image

from bench.pictures import photograph
from bench.timing import Call, ratio_of, significant
from mnv2 import pil_pictures
from mnv2.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Loader,
    Profile,
    decoded,
    picture_pipeline,
    profile,
)
from mnv2.distributed import World

FILES = 512
PICTURES = 4 * FILES  # each file four times an epoch, so that starting up weighs little
STAGE_PICTURES = 2 * FILES
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
        paths.append(str(folder / f"{number:04d}.jpg"))
        photograph(generator, (500, 375), 14).save(paths[-1], quality=90)
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
        picture = pil_pictures.opened(self.paths[number])
        if isinstance(self.transform, Profile):
            picture = pil_pictures.centre(picture, self.transform)
        else:
            picture = random_crop(picture, self.transform)
        return (np.asarray(picture, np.float32) - self.mean) / self.std, number


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


def cpu_clock(call: Call) -> float:
    """CPU seconds of ``call`` in this process and its children; Linux counts those that have ended, which all must."""

    def used() -> float:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = used()
    call()
    assert not multiprocessing.active_children()
    return used() - before


@pipeline_def
def decoding_pipeline(paths, transform):
    """The loader's pipeline cut after its decoder."""
    encoded, places = fn.readers.file(files=paths, labels=list(range(len(paths))))
    return decoded(encoded, transform, gpu=False), places


def our_loader(paths, transform):
    return Loader(paths, range(len(paths)), transform, batch_size=BATCH, world=World(), threads=THREADS)


def pil_loader(paths, transform):
    dataset = PilDataset(paths, transform)
    shuffle = isinstance(transform, Augmentation)
    return torch.utils.data.DataLoader(dataset, BATCH, shuffle=shuffle, drop_last=True, num_workers=THREADS)


def epoch(make: Callable, paths, transform) -> None:
    assert sum(1 for _ in make(paths, transform)) == len(paths) // BATCH


def run_pipeline(definition: Callable, paths, transform, **how) -> None:
    pipeline = definition(paths, transform, batch_size=BATCH, num_threads=THREADS, device_id=None, **how)
    for _ in range(len(paths) // BATCH):
        pipeline.run()


def assert_parity(paths, transform):
    """The same pictures in the same layout; in evaluation the same pixels, to a third of an 8-bit level."""
    batch, (pixels, numbers) = next(iter(our_loader(paths, transform))), next(iter(pil_loader(paths, transform)))
    images = pixels.permute(0, 3, 1, 2)
    assert batch.images.shape == images.shape
    assert batch.images.dtype == images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    if isinstance(transform, Profile):
        assert torch.equal(batch.numbers, numbers)
        assert (batch.images - images).abs().mean() * np.mean(IMAGENET_STD) < 0.33


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_loader(kind, paths, benchmark, side_by_side, record):
    benchmark.group = f"loader, {kind}, {THREADS} workers"
    transform = TRANSFORMS[kind]
    assert_parity(paths, transform)
    cpu = {"ours": [], "pil": []}

    def epoch_of(name: str, make: Callable) -> Call:
        return lambda: cpu[name].append(cpu_clock(lambda: epoch(make, paths, transform)))

    wall = side_by_side({"ours": epoch_of("ours", our_loader), "pil": epoch_of("pil", pil_loader)}, ROUNDS)
    per_picture = 1e3 / PICTURES
    figures = {f"{name}_pictures_per_second": significant(PICTURES / median(times)) for name, times in wall.items()}
    figures |= {f"{name}_cpu_ms_a_picture": significant(per_picture * median(times)) for name, times in cpu.items()}
    ratios = [
        ratio_of(f"loader, {kind}: {what}", seconds["ours"], seconds["pil"], unit, per_picture)
        for what, seconds, unit in (("time", wall, "ms a picture"), ("CPU time", cpu, "CPU ms a picture"))
    ]
    record("loader", {"case": f"{kind}, {THREADS} workers, {RESIZE} px", **figures, "ratios": ratios})


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_stages(kind, paths, benchmark, side_by_side, record):
    benchmark.group = f"loader by stages, {kind}, {THREADS} workers"
    transform, paths = TRANSFORMS[kind], paths[:STAGE_PICTURES]
    dataset = PilDataset(paths, transform)
    assert_parity(paths, transform)
    calls = {
        "ours": lambda: epoch(our_loader, paths, transform),
        "our pipeline": lambda: run_pipeline(picture_pipeline, paths, transform, gpu=False),
        "our decode": lambda: run_pipeline(decoding_pipeline, paths, transform),
        "pil": lambda: epoch(pil_loader, paths, transform),
        "pil data set": lambda: [dataset[number] for number in range(len(paths))],
        "pil decode": lambda: [pil_pictures.opened(path) for path in paths],
    }
    cpu = side_by_side(calls, ROUNDS, cpu_clock)
    stages = {
        "decode": (cpu["our decode"], cpu["pil decode"]),
        "resize": (less(cpu["our pipeline"], cpu["our decode"]), less(cpu["pil data set"], cpu["pil decode"])),
        "hand-over": (less(cpu["ours"], cpu["our pipeline"]), less(cpu["pil"], cpu["pil data set"])),
    }
    ratios, unclear = [], []
    for stage, sides in stages.items():
        if min(map(min, sides)) > 0:
            ratios.append(ratio_of(f"loader, {kind}: {stage}", *sides, "CPU ms a picture", 1e3 / len(paths)))
        else:
            unclear.append(stage)
    about = {"under_noise": ", ".join(unclear)} if unclear else {}
    record("loader", {"case": f"{kind} by stages, {THREADS} workers, {RESIZE} px", **about, "ratios": ratios})


def less(whole: list[float], part: list[float]) -> list[float]:
    """Seconds of what is in ``whole`` and not in ``part``, round by round."""
    return [a - b for a, b in zip(whole, part, strict=True)]
