"""The processes of a run: how they meet, talk, stop together, and end together when one of them fails."""

from __future__ import annotations

import atexit
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import sync_batch_norm

from . import launch
from .errors import InputError, RunError, Stopped

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CPU = torch.device("cpu")
_PATIENCE = timedelta(hours=1)  # one may look for a bad file among a million while the others wait
_MEETING = timedelta(minutes=10)  # how long processes wait for each other at the start
_SILENCE = 15.0  # seconds of that without a word
_LOOK = 0.5  # seconds between two looks for another process's failure
_FAREWELL = 5.0  # seconds that the first process waits for the others to leave after a failure
_IMPATIENCE = 3.0  # a second signal later than this many seconds is a person's


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` processes, and its device. ``host_group`` talks between CPUs alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    host_group: Any = field(default=None, compare=False, repr=False)

    def print(self, *words: object) -> None:
        """Print on one process, at once."""
        if self.rank == 0:
            print(*words, flush=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of ``tensor`` over the processes, on the CPU; one tensor of the same shape and dtype from each."""
        if self.size == 1:
            return tensor.cpu()
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor)
        return tensor.cpu()

    @torch.no_grad()
    def average_(self, tensors: list[Tensor]) -> None:
        """Replace ``tensors``, which are of one dtype and on the device, by their means over the processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        pieces = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def share(self, value: Any) -> Any:
        """The first process's ``value``, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.host_group)
        return values[0]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier(self.host_group)


@contextmanager
def world(device: str = "auto", distribute: bool = True) -> Iterator[World]:
    """Join the processes that were started together (see ``launch.find``) and leave them at the end.

    A failure in one process is told to all: each ends, and the first to fail says why.

    Args:
        device: "auto" (a GPU where there is one), "cuda" or "cpu". Processes on GPUs talk through NCCL, others through
            gloo.
        distribute: False for a run that must be one process.
    """
    place = launch.find()
    if not distribute and place.size > 1:
        raise InputError(
            f"--run_distribute: expected True, since {place.launcher} started {place.size} processes, got False"
        )
    where = _device(device, place)
    if place.size == 1:
        yield World(device=where)
        return
    store = _meet(place)
    try:
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            device_id=where if where.type == "cuda" else None,
            timeout=_PATIENCE,
        )
        host_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise RunError(f"the {place.size} processes can't talk to each other: {_first_line(error)}") from None
    failures = _Failures(store, place)
    try:
        try:
            yield World(place.rank, place.size, where, host_group)
        except Stopped as stopped:  # all processes have
            failures.close()
            _part(host_group)
            raise stopped
        failures.close()
        _part(host_group)
    except (KeyboardInterrupt, SystemExit, Stopped):
        raise
    except BaseException as error:
        told = failures.first(error)
        if told is error:
            raise
        raise told from error


def _part(host_group: Any) -> None:
    """Leave the others, when all are ready to; a process that fails must not wait for that."""
    dist.barrier(host_group)
    dist.destroy_process_group()


def _device(device: str, place: launch.Place) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected a CUDA GPU for 'cuda', but torch sees none")
    if device == "cpu" or not torch.cuda.is_available():
        return _CPU
    count = torch.cuda.device_count()
    # Slurm and MPI may show each process its own GPU alone.
    index = 0 if count == 1 and place.launcher != "torchrun" else place.local_rank
    if index >= count:
        flag = "--nproc_per_node: " if place.launcher == "torchrun" else ""
        raise InputError(f"{flag}expected at most one process a GPU, got local rank {index} where torch sees {count}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _meet(place: launch.Place) -> dist.Store:
    """The store that all processes share; the first of them serves it, or torchrun does."""
    assert place.meeting is not None
    words = f"waiting for the {place.size} processes that {place.launcher} announced, at {place.meeting}"
    notice = threading.Timer(_SILENCE, print, [words], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        store, _, _ = next(dist.rendezvous(place.meeting, place.rank, place.size, timeout=_MEETING))
    except (RuntimeError, ValueError) as error:  # torch's errors of a store are RuntimeErrors
        raise InputError(
            f"{place.launcher} announced {place.size} processes, but they didn't meet at {place.meeting} "
            f"({_first_line(error)}); MASTER_ADDR and MASTER_PORT in the environment name another place"
        ) from None
    finally:
        notice.cancel()
    # torchrun starts processes again around the same store, in which the last attempt has left its words.
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class _Failures:
    """The first failure among the processes, kept in their store.

    A thread looks for it, since a process may wait without end for one that is gone.
    """

    def __init__(self, store: dist.Store, place: launch.Place):
        self._store = store
        self._place = place
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(_clone(store),), daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Look no more: from here on the others may leave."""
        self._closed.set()
        self._watcher.join()

    def first(self, error: BaseException) -> BaseException:
        """What this process raises for ``error``: SystemExit where another failed first and says why."""
        self.close()
        lost = _is_lost_contact(error)
        with suppress(RuntimeError):
            if lost and self._told(self._store, patience=2 * _LOOK + 1):
                self._leave(self._store)
                return SystemExit(1)
            cause = f"{socket.gethostname()}\n{self._place.rank}\n{_first_line(error)}"
            first = self._store.compare_set("failure", "", cause).decode() == cause
            atexit.register(self._leave, self._store)  # after this process has said why
            if not first:
                return SystemExit(1)
        if lost:
            detail = re.sub(r"^\[[^\]]*\] *", "", _first_line(error)).partition(". ")[0]  # without gloo's source line
            return RunError(f"rank {self._place.rank} lost contact with another process ({detail})")
        if self._place.rank > 0 and isinstance(error, (InputError, RunError, OSError)):
            return RunError(f"rank {self._place.rank}: {error}")
        return error

    def _watch(self, store: dist.Store) -> None:
        with suppress(RuntimeError):  # the store goes with the process that serves it
            while not self._closed.wait(_LOOK):
                if self._told(store, patience=0):
                    self._leave(store)
                    sys.stdout.flush()
                    os._exit(1)  # the main thread may wait in a collective for ever

    def _told(self, store: dist.Store, patience: float) -> bool:
        """Whether another process has failed; where stderr is another machine's, say so here too."""
        deadline = time.monotonic() + patience
        while not store.check(["failure"]):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        host, rank, cause = store.get("failure").decode().split("\n", 2)
        if host != socket.gethostname() and self._place.local_rank == 0:
            sys.stderr.write(f"rank {rank} on {host} failed: {cause}\n")
        return True

    def _leave(self, store: dist.Store) -> None:
        """The last use of the store; the first process, which may serve it, goes last."""
        deadline = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            left = store.add("left", 1)
            while self._place.rank == 0 and left < self._place.size and time.monotonic() < deadline:
                time.sleep(0.1)
                left = store.add("left", 0)


def _clone(store: Any) -> dist.Store:
    """A connection for another thread (the method is missing from torch's stubs)."""
    return store.clone()


def _is_lost_contact(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class StopSignals:
    """SIGTERM and SIGINT as a wish that all processes fulfil after the same step; use it in a ``with`` statement.

    A second signal some seconds after the first ends this process at once (torchrun repeats one right away).
    """

    def __init__(self, world: World):
        self._world = world
        self._number = 0
        self._since = 0.0
        self._reduction: tuple[Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._reduction is not None and (kind is None or issubclass(kind, Stopped)):
            self._reduction[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number and time.monotonic() - self._since > _IMPATIENCE:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        elif not self._number:
            self._number, self._since = number, time.monotonic()
            if self._world.rank == 0:
                os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())

    def poll(self) -> int:
        """The signal that some process has received, else 0; the same in all processes, which call this in step.

        The answer of several processes is one call old, so that none waits for it.
        """
        if self._world.size == 1:
            return self._number
        received = 0
        if self._reduction is not None:
            flag, work = self._reduction
            work.wait()
            received = int(flag)
        flag = torch.tensor(self._number)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._world.host_group, async_op=True)
        self._reduction = flag, work
        return received


def convert_sync_batchnorm(network: ModuleT) -> ModuleT:
    """Let every BatchNorm inside ``network`` take its statistics over all processes in training; one stays as it was.

    It is done in place, on GPUs and CPUs, and changes no name in the state dict.
    """
    sync_batch_norm.convert_sync_batchnorm(network)
    return network
