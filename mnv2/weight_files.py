"""Files of weights as they are: tensors under the file's own names, and what it says of their network.

Known by content, not by name: safetensors, torch's files of tensors, our checkpoints, MindSpore's, Keras's, and the
folders of transformers and timm. Nothing that a file holds is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from . import hub_folders, keras_file, mindspore_file
from .errors import InputError
from .layouts import KERAS, MINDSPORE, Layout

FORMAT = "mnv2 weights, 1"
FOLDED = "mnv2 inference network"
# Where others' checkpoints keep the weights, those of an average first where one is asked for.
_AVERAGES = ("ema", "state_dict_ema", "model_ema")
_PLAIN = ("model", "state_dict", "model_state_dict")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")  # of DataParallel and DDP, torch.compile, Lightning


@dataclass(frozen=True)
class Content:
    """The ``tensors`` of a file and its ``sha256``.

    ``record`` is what it says of the network, by the names of ``weights.Weights``; ``averaged`` whether its tensors are
    an average that it holds beside others; ``layout`` whose names they have, where such a file has no others.
    """

    tensors: Mapping[str, Tensor]
    sha256: str
    record: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False
    layout: Layout | None = None


def read(path: str, *, ema: bool = True) -> Content:
    """Read a file of weights, or a folder of transformers or timm; ``ema`` takes an average where there is one.

    Raises:
        InputError: it can't be read, is damaged, or holds something else; the message begins with ``path``.
    """
    if os.path.isdir(path):
        weights, said = hub_folders.read(path)
        return replace(read(weights, ema=ema), record=said)
    start = _start(path)
    record: Mapping[str, Any] = {}
    averaged, layout = False, None
    try:
        if start[8:9] == b"{":  # eight bytes of length, then JSON
            tensors, record = _read_safetensors(path)
        elif keras_file.looks_like(start):
            tensors, layout = keras_file.read(path), KERAS
        elif mindspore_file.looks_like(start):
            tensors, layout = _read_mindspore(path), MINDSPORE
        else:
            tensors, record, averaged = _unwrapped(path, _read_torch(path), ema)
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in its reader
        cause = re.split(r"[\n,;(]|\. ", str(error))[0].strip()
        cause = cause if " " in cause else type(error).__name__  # some readers give a bare number
        raise InputError(f"{path} is damaged or no file of weights ({cause})") from None
    if layout is None:
        tensors = _plain(path, tensors)
    return Content(tensors, sha256(path), record, averaged, layout)


def sha256(path: str) -> str:
    """SHA-256 of the file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start(path: str) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            raise InputError(f"{path}: expected a file of weights, got none")
        with open(path, "rb") as file:
            return file.read(256)
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from None


def _read_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        kind = about.get("format", "")
        if kind.startswith(FOLDED):
            raise InputError(
                f"{path} holds a folded network (mnv2.InferenceNetwork.load reads it), expected weights with BatchNorm"
            )
        record = json.loads(about["record"]) if kind == FORMAT else {}
        return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118  # no mapping


def _read_mindspore(path: str) -> dict[str, Tensor]:
    """The tensors as torch has them, without those of an optimizer."""
    tensors = {}
    for name, tensor in mindspore_file.read(path).items():
        ours = mindspore_file.torchvision_name(name)
        if ours is not None:
            tensors[name] = mindspore_file.torchvision_tensor(ours, tensor)
    return tensors


def _read_torch(path: str) -> Any:
    try:
        with (
            open(path, "rb") as file,  # by its name torch would take some files for others
            torch.serialization.safe_globals([argparse.Namespace]),  # flags, beside the weights in many checkpoints
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is no file of plain weights (nothing in it was run): expected a state dict, or safetensors"
        ) from None


def _unwrapped(path: str, content: Any, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """The state dict in ``content``, what that says of the network, and whether it is an average."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a state dict, got {type(content).__name__}")
    averages = [name for name in _AVERAGES if ema and isinstance(content.get(name), dict)]
    found = [*averages, *(name for name in _PLAIN if isinstance(content.get(name), dict))]
    state = content[found[0]] if found else content
    config = content.get("config")
    record: dict[str, Any] = {}
    if "model" in found and "classes" in content:  # ours, which has a record of its training
        names = ("alpha", "resize", "padding", "norm_eps", "preprocessing")
        if isinstance(config, dict):
            record = {name: config[name] for name in names if config.get(name) is not None}
            record["source"] = "mnv2"
        if content["classes"] is not None:
            record["classes"] = content["classes"]
    return state, record, bool(averages)


def _plain(path: str, tensors: Mapping[Any, Any]) -> dict[str, Tensor]:
    """``tensors`` by name, without what wrapping a network puts before its names; all of them plain floats."""
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{path}: expected a tensor for every name, but {name!r} is none")
        counter = name.endswith("num_batches_tracked") or name == "n_averaged"
        if value.layout != torch.strided or value.is_meta or not (counter or value.is_floating_point()):
            raise InputError(f"{path}: expected plain floats for {name}, got {value.dtype}")
    plain = {}
    for name, value in tensors.items():
        short = _PREFIX.sub("", name)
        if short in plain:
            raise InputError(f"{path} holds {name} beside another {short}")
        plain[short] = value
    plain.pop("n_averaged", None)
    return plain
