"""Checkpoints: plain dictionaries that load with weights only, written so that a crash never leaves half a file.

A folder holds ``last.pt``, from which training goes on, ``best.pt``, the epoch with the best evaluation, and
``epoch_0001.pt`` ... of the last epochs. Each is whole; those of one moment share their bytes on disk.
"""

from __future__ import annotations

import glob
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from .config import InputError, RunError, TrainConfig
from .distributed import World

LAST, BEST = "last.pt", "best.pt"
_EPOCH = "epoch_{:04d}.pt"
_EPOCHS = "epoch_[0-9]*.pt"
_TEMPORARY = ".writing-"
_KEYS = ("model", "ema", "optimizer", "scaler", "loader", "random", "progress", "config", "classes", "listing")

# What a run that goes on may not change: it would be another network, other batches, or a state that doesn't fit.
_FIXED = (
    *("arch", "alpha", "resize", "padding", "norm_eps", "precision", "optimizer", "sync_bn", "freeze"),
    *("batch_size", "grad_accum_steps", "repeat_num", "seed", "synthetic"),
)
# What changes nothing in the weights that come out.
_FREE = (
    *("data_url", "pretrained", "num_classes", "class_index", "bad_files", "val_labels", "num_parallel_workers"),
    *("backend", "device", "run_distribute", "preprocessing", "ckpt_save_dir", "keep_checkpoint_max", "save_every"),
    *("resume", "eval_every", "log_every", "tensorboard"),
)


def prepare(folder: str) -> None:
    """Make ``folder`` and try to write there, so that a run doesn't find out at its end that it can't be saved.

    What a killed process has left half written is removed.

    Raises:
        InputError: the folder can't be made or written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in glob.glob(os.path.join(glob.escape(folder), _TEMPORARY + "*")):
            os.unlink(path)
    except OSError as error:
        raise InputError(f"--ckpt_save_dir: can't write to {folder}: {error.strerror}") from None


def set_aside(folder: str) -> str | None:
    """Move an earlier run's checkpoints to a folder of their own, since a new run would replace them; its path."""
    found = [os.path.join(folder, name) for name in (LAST, BEST) if os.path.exists(os.path.join(folder, name))]
    found += glob.glob(os.path.join(glob.escape(folder), _EPOCHS))
    if not found:
        return None
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(max(map(os.path.getmtime, found))))
    name = place = os.path.join(folder, f"earlier-{moment}")
    number = 1
    while os.path.exists(place):
        number += 1
        place = f"{name}-{number}"
    os.mkdir(place)
    for path in found:
        os.rename(path, os.path.join(place, os.path.basename(path)))
    return place


def resume(config: TrainConfig, world: World) -> tuple[str, dict[str, Any] | None]:
    """The checkpoint that ``--resume`` asks for, by path and content, the same in all processes; None for none.

    "auto" takes ``last.pt`` of the folder where there is one. The first process reads it: the others may be on machines
    that don't see the folder.
    """
    path = os.path.join(config.ckpt_save_dir, LAST)
    if config.resume is None:
        return path, None
    saved = None
    if config.resume != "auto":
        path = config.resume
    elif not world.share(os.path.exists(path)):
        world.print(f"--resume auto: there is no {path} yet, so training starts anew")
        return path, None
    if world.rank == 0:
        saved = read(path)
    return path, world.share(saved)


def save(path: str, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path``: all of it or nothing.

    Raises:
        RunError: it can't be written; what was at ``path`` is still there.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_TEMPORARY, delete=False) as file:
        try:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.replace(file.name, path)
            _sync_folder(folder)
        except BaseException as error:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
            if isinstance(error, (RuntimeError, OSError)):  # torch reports a failed write as the former
                raise RunError(f"can't write {path} (is the disk full?): {error}") from None
            raise


def keep(folder: str, *, epoch: int, best: bool, keep_max: int) -> None:
    """Let ``last.pt`` stay as that of ``epoch`` epochs, and as the best; of past epochs only ``keep_max`` stay."""
    last = os.path.join(folder, LAST)
    names = ([_EPOCH.format(epoch)] if keep_max else []) + ([BEST] if best else [])
    for name in names:
        temporary = os.path.join(folder, _TEMPORARY + name)
        try:
            os.link(last, temporary)
        except OSError:  # a file system without links
            save(os.path.join(folder, name), read(last))
        else:
            os.replace(temporary, os.path.join(folder, name))
    epochs = sorted(glob.glob(os.path.join(glob.escape(folder), _EPOCHS)))
    for path in epochs[: len(epochs) - keep_max]:
        os.unlink(path)


def read(path: str) -> dict[str, Any]:
    """A checkpoint of training; nothing that it holds is run.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    try:
        with open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"--resume: can't read {path}: {error.strerror}{_others(path)}") from None
    except Exception as error:  # a damaged file can fail anywhere in its reader
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"--resume: {path} is truncated, damaged or no checkpoint ({cause}){_others(path)}") from None
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"--resume: {path} is no checkpoint of training, since it lacks {missing[0]!r}")
    return content


def check(
    saved: Mapping[str, Any],
    path: str,
    config: TrainConfig,
    world: World,
    listing: Mapping[str, Any],
    classes: list[str] | None,
    num_classes: int,
) -> None:
    """Refuse to go on from ``saved`` where that would be another training; print what else has changed.

    Raises:
        InputError: it is of another architecture, world size or listing of pictures, or a flag differs that may not.
    """

    def refuse(what: str, had: object, got: object) -> None:
        if had != got:
            raise InputError(f"--resume: {path} is of training with {what.format(had)}, got {what.format(got)}")

    before, now = saved["config"], asdict(config)
    for name in _FIXED:
        refuse(f"--{name} {{}}", before.get(name), now[name])
    refuse("{} processes", len(saved["loader"]), world.size)
    if saved["listing"] != listing:
        had, got = (f"{one['pictures']} pictures, SHA-256 {one['sha256'][:12]}" for one in (saved["listing"], listing))
        raise InputError(f"--resume: {path} is of training on another listing of pictures ({had}), got {got}")
    refuse("{} classes", len(saved["model"]["classifier.1.bias"]), num_classes)
    refuse("classes numbered {}", saved["classes"], classes)
    if (saved["ema"] is None) != (config.ema_decay == 0):
        refuse("--ema_decay {}", before.get("ema_decay"), config.ema_decay)
    for name in now:
        if name not in (*_FIXED, *_FREE) and before.get(name) != now[name]:
            world.print(f"--{name} was {before.get(name)} so far and is {now[name]} from here on")


def random_state(world: World) -> dict[str, Any]:
    """State of the random numbers that training draws in this process (dropout's)."""
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any], world: World) -> None:
    """Go on with the random numbers of ``state``."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _others(path: str) -> str:
    epochs = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path) or "."), _EPOCHS)))
    epochs = [name for name in epochs if os.path.abspath(name) != os.path.abspath(path)]
    return f"; there is also {epochs[-1]}" if epochs else ""


def _sync_folder(folder: str) -> None:
    """Let the renaming itself survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
