"""The processes of a run: one of plain `python`, or the world that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import InputError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` processes, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

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

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun's variables tell of (none: a world of one) and leave them at the end.

    ``device`` is "auto" (a GPU where there is one), "cuda" or "cpu". Processes on GPUs talk through NCCL, others
    through gloo.
    """
    rank, local_rank, size = (_variable(name, default) for name, default in _VARIABLES)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected a CUDA GPU for 'cuda', but torch sees none")
    place = _CPU
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: expected at most one process a GPU, got local rank {local_rank} "
                f"where torch sees {torch.cuda.device_count()}"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if size < 1:
        raise InputError(f"WORLD_SIZE: expected a positive integer in the environment, got {size}")
    if size == 1:
        yield World(device=place)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE: {size} processes are announced, but {missing[0]} is not set; start them with torchrun"
        )
    if not 0 <= rank < size:
        raise InputError(f"RANK: expected 0 to {size - 1} for a WORLD_SIZE of {size}, got {rank}")
    try:
        if place.type == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    except ValueError as error:
        raise InputError(f"the launcher's variables in the environment can't be used: {error}") from None
    yield World(rank, size, place)
    # Only after success: a process that fails must not wait here for the others.
    dist.destroy_process_group()


_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}: expected an integer in the environment, got {text!r}") from None
