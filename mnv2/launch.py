"""Who started this process, and its place among the others, read from the environment."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from .errors import InputError

_PORTS = range(10000, 30000)  # under those that Linux hands out by itself
_DEFAULT_PORT = 29500  # torchrun's


class Place(NamedTuple):
    """Rank among ``size`` processes, rank on this machine, and where the processes meet (None for one process)."""

    launcher: str
    rank: int
    local_rank: int
    size: int
    meeting: str | None


class _Launcher(NamedTuple):
    """A launcher's variables; of several names the first that is set counts.

    A ``local_size`` under the size tells that there are several machines. ``job`` differs between two jobs on one
    machine.
    """

    name: str
    rank: str
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...] = ()
    node_list: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


# In this order: torchrun may run under any of the others, and mpirun inside a Slurm job.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", ("WORLD_SIZE",), ("LOCAL_RANK",)),
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        job=("PMIX_NAMESPACE",),
    ),
    _Launcher(
        "MPICH",
        "PMI_RANK",
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    _Launcher(
        "Slurm",
        "SLURM_PROCID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        node_list=("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


def find(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place as torchrun, Open MPI, MPICH (Intel MPI too) or Slurm tells it; one process without them.

    Processes meet at ``MASTER_ADDR`` and ``MASTER_PORT`` where these are set; torchrun sets them. Otherwise a launcher
    on one machine meets on the loopback address, and Slurm on the first node of the job.

    Raises:
        InputError: the variables are incomplete or contradict each other.
    """
    for launcher in _LAUNCHERS:
        if launcher.name == "MPICH" and "SLURM_PROCID" in environment and not _first(launcher.local_size, environment):
            continue  # Slurm sets PMI's rank and size too, for programs that want them
        if launcher.rank in environment or (launcher.name == "torchrun" and "WORLD_SIZE" in environment):
            return _place(launcher, environment)
    return Place("python", 0, 0, 1, None)


def _place(launcher: _Launcher, environment: Mapping[str, str]) -> Place:
    size_name = _first(launcher.size, environment) or launcher.size[0]
    size = _integer(size_name, environment, 1)
    if size < 1:
        raise InputError(f"{size_name}: expected a positive integer in the environment, got {size}")
    if size > 1 and launcher.rank not in environment:
        raise InputError(
            f"{size_name}: {size} processes are announced, but {launcher.rank} is not set; start them with torchrun"
        )
    rank = _integer(launcher.rank, environment, 0)
    if not 0 <= rank < size:
        raise InputError(f"{launcher.rank}: expected 0 to {size - 1} for a {size_name} of {size}, got {rank}")
    local_rank = _integer(_first(launcher.local_rank, environment) or launcher.rank, environment, 0)
    return Place(launcher.name, rank, local_rank, size, _meeting(launcher, environment, size) if size > 1 else None)


def _meeting(launcher: _Launcher, environment: Mapping[str, str], size: int) -> str:
    host = environment.get("MASTER_ADDR")
    if not host and launcher.name == "torchrun":
        raise InputError(
            f"WORLD_SIZE: {size} processes are announced, but MASTER_ADDR is not set; start them with torchrun"
        )
    nodes, local_size = _first(launcher.node_list, environment), _first(launcher.local_size, environment)
    if not host and nodes:
        host = first_node(environment[nodes])
    elif not host:
        if local_size and _integer(local_size, environment, size) < size:
            raise InputError(
                f"MASTER_ADDR: expected the first machine's address in the environment, since {launcher.name} started "
                "processes on several (mpirun -x MASTER_ADDR=HOST, or -genv MASTER_ADDR HOST)"
            )
        host = "127.0.0.1"
    port = environment.get("MASTER_PORT")
    if not port and launcher.name == "torchrun":
        raise InputError(
            f"WORLD_SIZE: {size} processes are announced, but MASTER_PORT is not set; start them with torchrun"
        )
    if port:
        _integer("MASTER_PORT", environment, 0)
    else:
        job = "/".join(environment[name] for name in launcher.job if name in environment)
        port = str(_PORTS[zlib.crc32(job.encode()) % len(_PORTS)] if job else _DEFAULT_PORT)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list such as ``gpu[03-07,12],cpu1``, which is ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if not match:
        raise InputError(f"SLURM_STEP_NODELIST: expected names of nodes in the environment, got {nodes!r}")
    return "".join(part or "" for part in match.groups())


def _first(names: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in environment), None)


def _integer(name: str, environment: Mapping[str, str], default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name}: expected an integer in the environment, got {text!r}") from None
