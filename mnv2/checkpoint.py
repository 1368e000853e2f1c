"""Checkpoints: plain dictionaries that load with weights only, written so that a crash never leaves half a file.

A folder holds ``last.pt``, from which training goes on, ``best.pt``, the epoch with the best evaluation, and
``epoch_0001.pt`` ... of the last epochs. Each is whole; those of one moment share their bytes on disk.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .config import OPEN, PREPROCESSING, TrainConfig
from .data import LoaderState, profile
from .distributed import World
from .engine import Progress
from .errors import InputError, RunError
from .inputs import TrainingData
from .trainer import Trainer
from .weights import Weights

LAST, BEST = "last.pt", "best.pt"
_EPOCH = "epoch_{:04d}.pt"
_EPOCHS = "epoch_[0-9]*.pt"
_WRITING = ".writing-"
_KEYS = (
    "model",
    "ema",
    "optimizer",
    "scaler",
    "loader",
    "random",
    "progress",
    "config",
    "classes",
    "listing",
    "validation",
    "device",
)


@contextmanager
def open_folder(config: TrainConfig) -> Iterator[None]:
    """Make the folder of the checkpoints and hold it for one run, inside the ``with`` statement.

    It is tried here, so that a run doesn't find out at its end that it can't be saved. What a killed process has left
    half written is removed.

    Raises:
        InputError: the folder can't be made or written, lies among the pictures, or is another run's at the moment.
    """
    folder = config.ckpt_save_dir
    for split in ("train", "val"):
        pictures = os.path.realpath(os.path.join(config.data_url, split))
        if not config.synthetic and os.path.commonpath([pictures, os.path.realpath(folder)]) == pictures:
            raise InputError(f"--ckpt_save_dir: expected a folder outside the pictures in {pictures}, got {folder}")
    descriptor = None
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            _lock(descriptor, folder)
        for path in glob.glob(os.path.join(glob.escape(folder), _WRITING + "*")):
            os.unlink(path)
    except OSError as error:
        raise InputError(f"--ckpt_save_dir: can't write to {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"--ckpt_save_dir: another run is writing to {folder}; wait for it or name another") from None


def set_aside(folder: str, but: str | None = None) -> str | None:
    """Move an earlier run's checkpoints to a folder of their own, since a new run would replace them; its path.

    An epoch's checkpoint ``but`` stays, from which the new run goes on.
    """
    found = [os.path.join(folder, name) for name in (LAST, BEST) if os.path.lexists(os.path.join(folder, name))]
    found += [path for path in _epochs(folder) if but is None or not os.path.samefile(path, but)]
    if not found:
        return None
    moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(max(os.lstat(path).st_mtime for path in found)))
    name = place = os.path.join(folder, f"earlier-{moment}")
    number = 1
    while os.path.exists(place):
        number += 1
        place = f"{name}-{number}"
    os.mkdir(place)
    for path in found:
        os.rename(path, os.path.join(place, os.path.basename(path)))
    return place


def save(folder: str, content: Mapping[str, Any], *, epoch: int = 0, best: bool = False, keep_max: int = 0) -> None:
    """Write ``content`` to ``last.pt`` in ``folder``: all of it or nothing.

    After ``epoch`` epochs (0 for none that has just ended) it is kept as that epoch's and, if so, as the best; of past
    epochs only the last ``keep_max`` stay. ``last.pt`` comes last, so that a run that is killed here does it again.

    Raises:
        RunError: it can't be written; what was there before still is.
    """
    names = [_EPOCH.format(epoch)] if epoch and keep_max else []
    names += [BEST] if best else []
    path = os.path.join(folder, _WRITING + LAST)
    try:
        with open(path, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            copy = os.path.join(folder, _WRITING + name)
            try:
                os.link(path, copy)
            except OSError:  # a file system without links
                shutil.copyfile(path, copy)
            os.replace(copy, os.path.join(folder, name))
        os.replace(path, os.path.join(folder, LAST))
        _sync_folder(folder)
        for old in _epochs(folder)[: -keep_max or None] if epoch else []:
            os.unlink(old)
    except (RuntimeError, OSError) as error:  # torch reports a failed write as the former
        for name in (LAST, *names):
            with suppress(OSError):
                os.unlink(os.path.join(folder, _WRITING + name))
        full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RunError(f"can't write to {folder}{' (is the disk full?)' if full else ''}: {error}") from None


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
        cause = str(error).partition("\n")[0]
        cause = f" ({cause})" if " " in cause else ""  # some readers give a bare number
        raise InputError(f"--resume: {path} is truncated, damaged or no checkpoint{cause}{_others(path)}") from None
    missing = [key for key in _KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"--resume: {path} is no checkpoint of training, since it lacks {missing[0]!r}")
    kinds = {"model": dict, "optimizer": dict, "loader": list, "random": list, "progress": dict, "config": dict}
    for key, kind in kinds.items():
        if not isinstance(content[key], kind):
            raise InputError(f"--resume: {path} is damaged: expected a {kind.__name__} as its {key!r}")
    return content


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run goes on from: file, content, and whether it is the folder's ``last.pt``."""

    path: str
    content: dict[str, Any]
    own: bool

    @property
    def epochs(self) -> int:
        """Epochs that are done."""
        return self.content["progress"]["epoch"]

    def weights(self) -> Weights:
        """The network's, with the names of its classes, and what else it is."""
        known = {name: self._known(name) for name in OPEN}
        return Weights(self.path, self.content["model"], "mnv2", classes=self.content["classes"], **known)

    def _known(self, name: str) -> Any:
        """What the run so far had for a flag of ``OPEN``."""
        value = self.content["config"].get(name)
        kinds = (int, float) if isinstance(OPEN[name], float) else str
        if not isinstance(value, kinds) or (name == "preprocessing" and value not in PREPROCESSING):
            raise InputError(f"--resume: {self.path} is damaged: expected its --{name}, got {value!r}")
        return value

    def loader_state(self, world: World) -> LoaderState:
        """Where this process's loader was."""
        return self.content["loader"][world.rank]

    def check_run(self, config: TrainConfig, world: World) -> None:
        """Refuse another training; print what else has changed.

        Raises:
            InputError: architecture, world size or kind of device is another, or a flag that may not be.
        """
        before, now = self.content["config"], asdict(config)
        fields = dataclasses.fields(config)
        for name in [field.name for field in fields if field.metadata.get("fixed")]:
            self._same(f"--{name} {{}}", before.get(name), now[name])
        had, got = (profile(name, now["resize"]) for name in (self._known("preprocessing"), now["preprocessing"]))
        self._same("pictures of mean and std {}", (had.mean, had.std), (got.mean, got.std))
        self._same("{} processes", len(self.content["loader"]), world.size)
        self._same("a {} as device", self.content["device"], world.device.type)
        for name in ("ema_decay", "momentum"):  # their state is there or isn't
            if (before.get(name) == 0) != (now[name] == 0):
                self._same(f"--{name} {{}}", before.get(name), now[name])
        for name in now:
            if name not in ("resume", "ckpt_save_dir") and before.get(name) != now[name]:
                nothing = ", which counts for nothing here" if name == "pretrained" else ""
                world.print(f"--{name} was {before.get(name)} so far and is {now[name]} from here on{nothing}")

    def check_data(self, data: TrainingData) -> None:
        """Refuse other pictures or classes.

        Raises:
            InputError: they are others.
        """
        listing = self.content["listing"]
        if listing != data.listing:
            had, got = (f"{one['pictures']} pictures, SHA-256 {one['sha256'][:12]}" for one in (listing, data.listing))
            raise InputError(f"--resume: {self.path} is of training on another listing of pictures ({had}), got {got}")
        self._same("{} classes", len(self.content["model"]["classifier.1.bias"]), data.num_classes)
        self._same("classes numbered {}", self.content["classes"], data.classes)

    def restore(self, trainer: Trainer, config: TrainConfig, data: TrainingData, world: World) -> Progress:
        """Bring ``trainer`` and this process's random numbers back to where they were.

        Raises:
            InputError: the checkpoint holds something else than it should.
        """
        try:
            trainer.load(self.content)
            set_random_state(self.content["random"][world.rank], world)
            progress = Progress(**self.content["progress"])
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(f"--resume: {self.path} is damaged ({type(error).__name__}: {cause})") from None
        world.print(f"goes on from {self.path}: {progress.epoch} epochs and {progress.step} steps are done")
        same = (self.content["validation"], self.content["config"].get("preprocessing")) == (
            data.validation_listing,
            config.preprocessing,
        )
        if progress.best_top1 is not None and not (self.own and same):
            # The best of another folder isn't in this one, and other pictures or crops can't be compared.
            world.print("the best evaluation so far doesn't count from here on")
            progress.best_top1 = progress.best_epoch = None
        return progress

    def _same(self, what: str, had: object, got: object) -> None:
        if had != got:
            raise InputError(f"--resume: {self.path} is of training with {what.format(had)}, got {what.format(got)}")


def resume(config: TrainConfig, world: World) -> Saved | None:
    """The checkpoint that ``--resume`` asks for, the same in all processes; None for none.

    "auto" takes ``last.pt`` of the folder where there is one. The first process reads it: the others may be on machines
    that don't see the folder.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    if config.resume is None:
        return None
    last = os.path.join(config.ckpt_save_dir, LAST)
    saved, path = None, last if config.resume == "auto" else config.resume
    if world.rank == 0 and (config.resume != "auto" or os.path.lexists(last)):  # a dangling link is no fresh start
        saved = Saved(path, read(path), os.path.exists(last) and os.path.samefile(path, last))
    saved = world.share(saved)
    if saved is None:
        world.print(f"--resume auto: there is no {last} yet, so training starts anew")
    return saved


def random_state(world: World) -> dict[str, Any]:
    """State of the random numbers that training draws in this process (dropout's)."""
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any], world: World) -> None:
    """Go on with the random numbers of ``state``."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:  # then this device is one too (see ``Saved.check_run``)
        torch.cuda.set_rng_state(state["cuda"], world.device)


def _epochs(folder: str) -> list[str]:
    """Checkpoints of epochs, oldest first."""
    found = glob.glob(os.path.join(glob.escape(folder), _EPOCHS))
    return sorted(found, key=lambda path: (len(path), path))  # epoch_10000 comes after epoch_9999


def _others(path: str) -> str:
    epochs = [name for name in _epochs(os.path.dirname(path) or ".") if os.path.abspath(name) != os.path.abspath(path)]
    return f"; there is also {epochs[-1]}" if epochs else ""


def _sync_folder(folder: str) -> None:
    """Let the renaming itself survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
