"""Processes that start at once, as forks of one that has imported everything.

Python, torch and DALI take some four seconds to start, which a test of eight processes would pay eight times. As a
script this file is the process that they are forks of: it reads requests from its standard input, one a line.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Forked:
    """A process of the script and the words in ``command``; what it can do is as in ``subprocess.Popen``."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.args = command
        self.returncode: int | None = None
        self._server = server()
        self._files = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115  # closed in communicate
        names = [file.name for file in self._files]
        self.pid = self._server.ask(command=command, environment=environment, folder=os.getcwd(), files=names)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        output, errors = (file.read() for file in self._files)
        for file in self._files:
            file.close()
        return output, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks, and a talk with it."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(  # in a session of its own, which Ctrl-C doesn't reach
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        atexit.register(self._process.communicate)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@functools.cache
def server() -> Server:
    """The one of this process's tests, with what is read from the environment once, at an import."""
    mine = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return Server({**mine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def become(command: list[str], environment: dict[str, str], folder: str, files: list[str]) -> None:
    """In a fork: run what a new process would. How that ends, with which status and words, is left to Python."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for place, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), place)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    import torch._dynamo  # which an optimizer imports

    import train
    import validate

    assert Path(train.__file__).parent == Path(validate.__file__).parent == ROOT
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread of its parent's alone"
    assert not torch.cuda.is_initialized()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return become(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
