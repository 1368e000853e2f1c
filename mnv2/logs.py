"""What a run says: the reference's lines on stdout, a progress bar on a terminal, ``log.jsonl``, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any, TextIO, TypeVar

import torch
from tqdm import tqdm

from .config import TrainConfig
from .distributed import World
from .engine import Evaluation, Progress, wilson_interval
from .errors import InputError
from .predictions import Predictions

T = TypeVar("T")

_PACKAGES = ("mnv2", "torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def epoch_lines(progress: Progress, epochs: int, lr: float, epoch_seconds: float) -> str:
    """Two lines of an epoch of training; times are in milliseconds.

    ``time`` is that of the training steps, ``Epoch time`` (``epoch_seconds``) that of the whole epoch.
    """
    steps, mean = progress.step, progress.mean_loss
    return (
        f"Epoch:[{progress.epoch}/{epochs}], step:[{steps}/{steps}], loss:[{progress.losses[-1]:5.3f}/{mean:5.3f}], "
        f"time:{progress.seconds * 1000:5.3f}, lr:{lr:5.5f}\n"
        f"Epoch time:{epoch_seconds * 1000:5.3f}, per step time:{epoch_seconds * 1000 / steps:5.3f}, "
        f"avg loss:{mean:5.3f}"
    )


def evaluation_line(epoch: int, epochs: int, weights: str, result: Evaluation) -> str:
    """A line of an evaluation after an epoch, of the weights called "model" or "ema"."""
    return (
        f"Evaluation:[{epoch}/{epochs}], {weights}: top-1 {result.top1 / result.pictures:.2%} "
        f"({result.top1} of {result.pictures}), top-5 {result.top5 / result.pictures:.2%}, loss {result.loss:.4f}"
    )


def evaluation_lines(result: Evaluation, smooth_factor: float, classes: Sequence[str] | None = None) -> str:
    """The lines of an evaluation; the last is a Python dictionary of the two accuracies.

    With the names of the ``classes`` by number there is a table of them, the worst first.
    """
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
    if classes is not None:
        assert result.predictions is not None
        lines += _class_lines(result.predictions, classes)
    accuracies = {"Top_1_Accuracy": result.top1 / result.pictures, "Top_5_Accuracy": result.top5 / result.pictures}
    return "\n".join([*lines, str(accuracies)])


def _class_lines(predictions: Predictions, classes: Sequence[str]) -> list[str]:
    rows = [("class", "pictures", "right", "top-1")]
    for label, pictures, right in predictions.by_class():
        rows.append((classes[label], str(pictures), str(right), f"{right / pictures:.2%}"))
    width = max(len(name) for name, *_ in rows)
    return [f"{name:{width}}  {pictures:>8}  {right:>8}  {share:>7}" for name, pictures, right, share in rows]


def with_progress(items: Iterable[T], total: int, title: str, world: World, *, done: int = 0) -> Iterator[T]:
    """``items`` with a bar on stderr, on one process, and only where stderr is a terminal."""
    hidden = world.rank != 0 or not sys.stderr.isatty()
    bar = tqdm(items, title, total, leave=False, disable=hidden, unit="step", dynamic_ncols=True, initial=done)
    return iter(bar)


class RunLog:
    """``log.jsonl`` in the checkpoint folder, an object a line, and TensorBoard's files where asked for.

    The first object holds the configuration and the versions; ``event`` tells what each further one is: the "steps" of
    an interval, an "epoch", an "evaluation". Names end in their unit. A run into the same folder goes on below, and one
    that goes on from a checkpoint begins with the event "resume": what the log holds beyond its ``epoch`` and ``step``
    is done again, so that of two lines of one moment the last counts. One process writes; close it, or use ``with``.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, config: TrainConfig, world: World, progress: Progress, *, steps: int, num_classes: int):
        self._file: TextIO | None = None
        self._board: Any = None
        if world.rank != 0:
            return
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(f"--tensorboard: {error}; pip install 'mnv2[tensorboard]'") from None
            self._board = SummaryWriter(os.path.join(config.ckpt_save_dir, "tensorboard"), purge_step=progress.epoch)
        path = os.path.join(config.ckpt_save_dir, "log.jsonl")
        torn = _is_torn(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:
            self._file.write("\n")
        resumed = progress.epoch > 0 or progress.step > 0
        self._write(
            "resume" if resumed else "start",
            **({"epoch": progress.epoch, "step": progress.step} if resumed else {}),
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

    def steps(self, progress: Progress, count: int, lr: float, seconds: float, pictures: int) -> None:
        """Log the last ``count`` steps, which saw ``pictures`` pictures over all processes in ``seconds``."""
        figures = {
            "loss_mean": math.fsum(progress.losses[-count:]) / count,
            "learning_rate": lr,
            "seconds_per_step": seconds / count,
            "pictures_per_second": pictures / seconds,
        }
        self._write("steps", epoch=progress.epoch, step=progress.step, steps=count, **figures)

    def epoch(self, progress: Progress, lr: float, epoch_seconds: float, pictures: int) -> None:
        """Log an epoch that saw ``pictures`` pictures over all processes."""
        figures = {
            "loss_last": progress.losses[-1],
            "loss_mean": progress.mean_loss,
            "learning_rate": lr,
            "steps_seconds": progress.seconds,
            "epoch_seconds": epoch_seconds,
            "pictures_per_second": pictures / epoch_seconds,
        }
        self._write("epoch", epoch=progress.epoch, steps=progress.step, **figures)
        self._scalars("train", figures, progress.epoch)

    def evaluation(self, progress: Progress, result: Evaluation, weights: str) -> None:
        """Log an evaluation of ``weights``, which is "model" or "ema"."""
        figures = {
            "top1_share": result.top1 / result.pictures,
            "top5_share": result.top5 / result.pictures,
            "loss_mean": result.loss,
            "pictures_per_second": result.pictures_per_second,
        }
        self._write("evaluation", epoch=progress.epoch, weights=weights, pictures=result.pictures, **figures)
        self._scalars(f"evaluation_{weights}", figures, progress.epoch)

    def _scalars(self, group: str, figures: dict[str, float], epoch: int) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, epoch)

    def _write(self, event: str, **content: Any) -> None:
        if self._file is None:
            return
        # JSON has no infinity: a loss that is none becomes null.
        content = {name: None if value in (math.inf, -math.inf) else value for name, value in content.items()}
        line = {"event": event, "unix_time_seconds": round(time.time(), 3), **content}
        json.dump(line, self._file, allow_nan=False)
        self._file.write("\n")
        self._file.flush()


def _is_torn(path: str) -> bool:
    """Whether a killed process has left half a line."""
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the distributions that a result depends on, those named in ``more`` too."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
