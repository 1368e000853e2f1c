"""What a run says: the reference's lines on stdout, a progress bar on a terminal, ``log.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .config import InputError, TrainConfig
from .data import Batch
from .distributed import World
from .engine import Evaluation, TrainedEpoch, wilson_interval

_PACKAGES = ("mnv2", "torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def epoch_lines(epoch: int, epochs: int, result: TrainedEpoch, lr: float, epoch_seconds: float) -> str:
    """Two lines of an epoch of training; times are in milliseconds.

    ``time`` is that of the training steps, ``Epoch time`` (``epoch_seconds``) that of the whole epoch.
    """
    steps = result.steps
    return (
        f"Epoch:[{epoch}/{epochs}], step:[{steps}/{steps}], loss:[{result.last_loss:5.3f}/{result.mean_loss:5.3f}], "
        f"time:{result.seconds * 1000:5.3f}, lr:{lr:5.5f}\n"
        f"Epoch time:{epoch_seconds * 1000:5.3f}, per step time:{epoch_seconds * 1000 / steps:5.3f}, "
        f"avg loss:{result.mean_loss:5.3f}"
    )


def evaluation_lines(result: Evaluation, smooth_factor: float) -> str:
    """The lines of an evaluation; the last is a Python dictionary of the two accuracies."""
    lines = [
        f"{result.pictures} pictures, loss {result.loss:.4f} (label smoothing {smooth_factor:g}), "
        f"{result.pictures_per_second:.1f} pictures a second"
    ]
    for name, right in (("top-1", result.top1), ("top-5", result.top5)):
        low, high = wilson_interval(right, result.pictures)
        lines.append(
            f"{name}: {right} of {result.pictures} right, {right / result.pictures:.2%}, "
            f"95% interval {low:.2%} to {high:.2%}"
        )
    accuracies = {"Top_1_Accuracy": result.top1 / result.pictures, "Top_5_Accuracy": result.top5 / result.pictures}
    return "\n".join([*lines, str(accuracies)])


def with_progress(batches: Iterable[Batch], steps: int, title: str, world: World) -> Iterator[Batch]:
    """``batches`` with a bar on stderr, on one process, and only where stderr is a terminal."""
    hidden = world.rank != 0 or not sys.stderr.isatty()
    return iter(tqdm(batches, title, steps, leave=False, disable=hidden, unit="step", dynamic_ncols=True))


class RunLog:
    """``log.jsonl`` in the checkpoint folder, an object a line, and TensorBoard's files where asked for.

    The first object holds the configuration and the versions, each further one an epoch; ``event`` tells which, and a
    name ends in its unit. A run into the same folder goes on below. One process writes; close it, or use ``with``.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, world: World, *, steps: int, num_classes: int):
        self._file: TextIO | None = None
        self._board: Any = None
        if world.rank != 0:
            return
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"--tensorboard: {error}; pip install 'mnv2[tensorboard]'") from None
            self._board = SummaryWriter(os.path.join(config.ckpt_save_dir, "tensorboard"))
        self._file = open(os.path.join(config.ckpt_save_dir, "log.jsonl"), "a", encoding="utf-8")  # noqa: SIM115
        self._write(
            "start",
            config=asdict(config),
            versions=versions(),
            device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
            processes=world.size,
            steps_per_epoch=steps,
            num_classes=num_classes,
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()

    def epoch(self, epoch: int, result: TrainedEpoch, lr: float, epoch_seconds: float, pictures: int) -> None:
        """Log an epoch that saw ``pictures`` pictures over all processes."""
        figures = {
            "loss_last": result.last_loss,
            "loss_mean": result.mean_loss,
            "learning_rate": lr,
            "steps_seconds": result.seconds,
            "epoch_seconds": epoch_seconds,
            "pictures_per_second": pictures / epoch_seconds,
        }
        self._write("epoch", epoch=epoch, steps=result.steps, **figures)
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"train/{name}", value, epoch)

    def _write(self, event: str, **content: Any) -> None:
        if self._file is None:
            return
        json.dump({"event": event, "unix_time_seconds": round(time.time(), 3), **content}, self._file)
        self._file.write("\n")
        self._file.flush()


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the distributions that a result depends on, those named in ``more`` too."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
