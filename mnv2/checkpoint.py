"""Checkpoints: plain dictionaries that load with weights only, written so that a crash never leaves half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .config import InputError, RunError, TrainConfig


def prepare(folder: str) -> None:
    """Make ``folder`` and try to write there, so that a run doesn't find out at its end that it can't be saved.

    Raises:
        InputError: the folder can't be made or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--ckpt_save_dir: can't write to {folder}: {error.strerror}") from None


def save(path: str, model: nn.Module, *, config: TrainConfig, classes: list[str] | None, epoch: int) -> None:
    """Write ``model``'s state dict and what it takes to use it to ``path``: all of it or nothing.

    The file holds ``model``, ``config`` (flags by name), ``classes`` (names by number, None where there were no
    folders) and ``epoch`` (epochs done).
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write(path, {"model": weights, "config": asdict(config), "classes": classes, "epoch": epoch})


def _write(path: str, content: Mapping[str, Any]) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{os.path.basename(path)}-", delete=False) as file:
        try:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException as error:
            os.unlink(file.name)
            if isinstance(error, RuntimeError):  # how torch reports a failed write
                raise RunError(f"can't write {path} (is the disk full?): {error}") from None
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
