"""Steps one after the other: each with a limit of time and a log, what is finished kept for the next run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import replace_file

ROOT = Path(__file__).resolve().parent.parent
STATE = "state.json"
TAIL = 12  # lines of a step's output on the screen
GRACE = 10.0  # seconds from asking a step to stop until it is made to
DONE, NOT_RUN, FAILED = "done", "not run", "failed"


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other for at most ``seconds``, and what to do where one fails.

    In ``advice`` ``{log}`` stands for the file of its output. A step with ``why_not`` isn't run, for that reason. One
    that was done to another ``extent`` isn't done.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    seconds: float
    advice: str
    why_not: str = ""
    extent: str = ""


class State:
    """What is finished, in a file, for one ``key``: of another key nothing is."""

    def __init__(self, path: Path, key: Mapping[str, Any], *, again: bool = False):
        self._path = path
        self._content: dict[str, Any] = {"key": dict(key), "steps": {}}
        if not again:
            with suppress(OSError, ValueError, KeyError, TypeError):  # whatever it is, it isn't what is needed
                found = json.loads(path.read_text())
                if found["key"] == self._content["key"] and isinstance(found["steps"], dict):
                    self._content = found

    def finished(self, step: Step) -> bool:
        """Whether the step has been done."""
        found = self._content["steps"].get(step.name, {})
        return found.get("status") == DONE and found.get("extent") == step.extent

    def put(self, step: Step, status: str, seconds: float = 0.0, why: str = "") -> None:
        """Record how the step went; the file is there whole or as it was."""
        entry = {"status": status, "seconds": round(seconds, 1), "why": why, "extent": step.extent}
        self._content["steps"][step.name] = entry
        replace_file(self._path, json.dumps(self._content, indent=2) + "\n")


def run_steps(steps: Sequence[Step], folder: Path, key: Mapping[str, Any], *, again: bool = False) -> int:
    """Run what of ``steps`` isn't finished; 0, 1 where one has failed, 130 where Ctrl-C has stopped it."""
    folder.mkdir(parents=True, exist_ok=True)
    state, spare = State(folder / STATE, key, again=again), 0.0
    for number, step in enumerate(steps, 1):
        title, log = f"[{number}/{len(steps)}] {step.name}", folder / f"{number:02}-{step.name}.log"
        if step.why_not:
            state.put(step, NOT_RUN, why=step.why_not)
            spare += step.seconds
            print(f"{title}: not run, {step.why_not}", flush=True)
            continue
        if state.finished(step):
            spare += step.seconds
            print(f"{title}: done before", flush=True)
            continue
        limit = step.seconds + spare
        print(f"{title}: at most {limit:.0f} s, output in {shown(log)}", flush=True)
        start = time.monotonic()
        try:
            problem = run_step(step, limit, log)
        except KeyboardInterrupt:
            print(f"bench.gpu: interrupted in {step.name}; run it again to go on there", file=sys.stderr)
            return 130
        seconds = time.monotonic() - start
        spare = max(0.0, limit - seconds)
        print("".join(f"    {line}\n" for line in tail(log)), end="", flush=True)
        state.put(step, FAILED if problem else DONE, seconds, problem)
        if problem:
            advice = step.advice.format(log=shown(log))
            print(f"bench.gpu: {step.name} {problem}: {advice}", file=sys.stderr)
            return 1
        print(f"{title}: done in {seconds:.0f} s", flush=True)
    return 0


def run_step(step: Step, limit: float, log: Path) -> str:
    """Run the commands of a step, what they print in ``log``; what is wrong, or an empty string."""
    deadline = time.monotonic() + limit
    with log.open("w") as file:
        for command in step.commands:
            print(f"$ {shlex.join(command)}", file=file, flush=True)
            # In a session of its own: what a command has started ends with it.
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"has taken longer than its {limit:.0f} s (--minutes gives more)"
            finally:
                end(process)
            if status:
                return f"has failed (exit status {status})"
    return ""


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def tail(log: Path) -> list[str]:
    """The last lines of a log."""
    return log.read_text(errors="replace").splitlines()[-TAIL:]


def shown(path: Path) -> str:
    """``path`` as it is from the root of the project."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
