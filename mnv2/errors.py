"""What goes wrong in ways that are expected, and the exit status of a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something that the user gave is wrong; the message is one line that says what was expected and what came."""


class RunError(RuntimeError):
    """A run can't go on, or its result can't be trusted; the message is one line that says why."""


class Stopped(Exception):  # noqa: N818  # no error
    """A signal has stopped the run, which was saved; the message is empty where another process tells it."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


def exit_status(script: str, action: Callable[[], None]) -> int:
    """Do ``action`` and return the exit status of ``script``; what is expected to go wrong becomes one line."""
    try:
        action()
    except BrokenPipeError:  # whoever read has gone, and Python would say so again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, RunError, OSError) as error:
        sys.stderr.write(f"{script}: {error}\n")  # in one piece: the processes of a run share stderr
        return 1
    except Stopped as stopped:
        if str(stopped):
            sys.stderr.write(f"{script}: {stopped}\n")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        sys.stderr.write(f"{script}: interrupted\n")
        return 130
    return 0
