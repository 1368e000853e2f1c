"""Files that are there whole or as they were."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from .errors import InputError, RunError


def check_place(argument: str, path: str) -> None:
    """Raise InputError, in the name of ``argument``, unless the file ``path`` can be written."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{argument}: expected a file, got {path}")
    folder = os.path.dirname(path) or "."
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{argument}: can't write to {folder}: {error.strerror}") from None


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Name of a file to write, which takes the place of ``path`` where the ``with`` statement ends without error."""
    temporary = f"{path}.{os.getpid()}.writing"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def write_safetensors(path: str, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write ``state`` to the safetensors file ``path``, all of it or nothing.

    Raises:
        RunError: it can't be written; what was there before still is.
    """
    try:
        # safetensors' own writer would leave a file that its owner alone may read.
        content = save({name: tensor.contiguous() for name, tensor in state.items()}, metadata=metadata)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(content)
    except (OSError, SafetensorError) as error:
        raise RunError(f"can't write {path}: {error}") from None
