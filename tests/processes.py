"""Scripts started as users start them: alone, under torchrun, or as processes that find each other by variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from forks import ROOT, Forked

Started = subprocess.Popen[str] | Forked


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """A user's without a GPU, which each process would want for itself; the tests' interpreter is no part of it."""
    mine = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**mine, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(script: str | Path, *words: object, processes: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` to its end, under torchrun where ``processes`` are given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**more))


def popen(command: list[str], **more: str) -> subprocess.Popen[str]:
    """Start ``command`` with ``more`` in its environment."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more))


def fork(script: str | Path, *words: object, **more: str) -> Started:
    """Start ``script`` as `popen` does, at once; where there is a GPU no fork has what its libraries have begun."""
    command = [str(ROOT / script), *map(str, words)]
    if torch.cuda.device_count():
        return popen([sys.executable, *command], PYTHONPATH=str(ROOT), **more)
    return Forked(command, environment(**more))


def start(script: str | Path, *words: object, processes: int = 1, **more: str) -> list[Started]:
    """Start ``processes`` that find each other by torchrun's variables, each with a handle of its own."""
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **more}
    return [fork(script, *words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(processes)]


def finish(started: Sequence[Started], timeout: float = 120) -> list[subprocess.CompletedProcess[str]]:
    """What each of the processes has returned and printed; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]
