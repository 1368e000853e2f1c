"""Records of all processes in one tensor, and names of process groups, which operations can take as arguments."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import common

DEFAULT = "default"  # torch's own names are numbers and hashes


def register(group: dist.ProcessGroup | None) -> str:
    """Name under which ``gather`` finds ``group`` again, None being the default group, whichever it is by then.

    The name is torch's own, the same in all processes and at each call; it keeps no group alive. It is never "",
    which stands for "no other processes".
    """
    if group is None or (dist.is_initialized() and group is dist.group.WORLD):
        return DEFAULT
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group that this process is in, got {group!r}")
    return group.group_name


@torch.compiler.assume_constant_result  # what torch.compile can't trace it runs, once
def active(name: str) -> str:
    """``name``, or "" where this process is on its own: alone in the group, or it is the default one and there is none.

    Raises:
        RuntimeError: the group is gone or never was, though there are others.
    """
    if not dist.is_initialized():
        return "" if name == DEFAULT else name
    return "" if dist.get_world_size(_find(name)) == 1 else name


def gather(record: Tensor, name: str) -> Tensor:
    """``record [L...]`` of every process of group ``name``, stacked ``[R, L...]`` in the order of ranks.

    All of them must call it, with records of one shape and type; it isn't differentiable.

    Raises:
        RuntimeError: there is no such group, or no longer.
    """
    group = _find(name)
    R = dist.get_world_size(group)
    stacked = common.allocate((R * record.numel(),), record)
    dist.all_gather_single(stacked, record.detach().flatten(), group=group)
    return stacked.view(R, *record.shape)


def _find(name: str) -> dist.ProcessGroup | None:
    if not dist.is_initialized():
        raise RuntimeError(
            f"group: expected torch.distributed.init_process_group to have been called, got {name!r} without it"
        )
    if name == DEFAULT:
        return None
    try:
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str by another name
    except (RuntimeError, LookupError) as error:
        raise RuntimeError(
            f"group: expected a process group's name, got {name!r}, which is gone or never was"
        ) from error
