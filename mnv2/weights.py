"""Weights from files: nothing that a file holds is run, and names and shapes are checked before they are used."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file
from torch import Tensor

from .config import NetworkConfig
from .errors import InputError
from .model import MobileNetV2

_CLASSIFIER_PREFIX = "classifier.1."
_CLASSIFIER = _CLASSIFIER_PREFIX + "weight"


@dataclass(frozen=True)
class Weights:
    """A state dict in torchvision's names and its file.

    A checkpoint records the classes, padding and epsilon of its training too, and may hold averaged weights beside the
    plain ones.
    """

    path: str
    state: Mapping[str, Tensor]
    classes: list[str] | None = None
    padding: str | None = None
    norm_eps: float | None = None
    averaged: bool = False

    def __str__(self) -> str:
        """The file, and whether these are a checkpoint's averaged weights."""
        return self.path + (" (the average)" if self.averaged else "")

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return len(self.state[_CLASSIFIER])

    def load_into(self, model: MobileNetV2, *, classifier: bool = True) -> None:
        """Copy the weights into ``model``; without ``classifier`` its own stays.

        Raises:
            InputError: a name, a shape or the padding doesn't fit; the first that doesn't is told.
        """
        if self.padding not in (None, model.padding):
            raise InputError(f"--padding: {self.path} was trained with {self.padding}, got {model.padding}")
        if self.norm_eps not in (None, model.norm_eps):
            raise InputError(f"--norm_eps: {self.path} was trained with {self.norm_eps}, got {model.norm_eps}")
        wanted = model.state_dict()
        state = dict(self.state)
        if not classifier:
            state.update({name: tensor for name, tensor in wanted.items() if name.startswith(_CLASSIFIER_PREFIX)})
        for name, tensor in wanted.items():
            if name not in state:
                raise InputError(f"--pretrained: {self.path} lacks {name}, which MobileNetV2 needs")
            if state[name].shape != tensor.shape:
                raise InputError(
                    f"--pretrained: {self.path} holds {name} of shape {tuple(state[name].shape)}, but the network "
                    f"with --alpha {model.alpha} and {model.num_classes} classes has {tuple(tensor.shape)}"
                )
        for name in state:
            if name not in wanted:
                raise InputError(f"--pretrained: {self.path} holds {name}, which MobileNetV2 doesn't have")
        model.load_state_dict(state)


def build(config: NetworkConfig, num_classes: int, weights: Weights | None) -> MobileNetV2:
    """The network of ``config`` with ``num_classes`` outputs, and ``weights`` in it where there are some.

    Raises:
        InputError: they don't fit it.
    """
    model = MobileNetV2(
        config.alpha, num_classes, backend=config.backend, padding=config.padding, norm_eps=config.norm_eps
    )
    if weights is not None:
        weights.load_into(model)
    return model


def find(pretrained: bool | str, alpha: float, resize: int, *, ema: bool = True) -> Weights | None:
    """The weights that ``--pretrained`` asks for: None for False, a file by its path, the weights folder for True.

    The weights folder is ``$MNV2_WEIGHTS``, else ``mnv2`` in the user's cache. ``ema`` asks for a checkpoint's averaged
    weights where it has them.

    Raises:
        InputError: the file is missing, damaged, or no weights; for True the message says where a file would go.
    """
    if pretrained is False:
        return None
    if pretrained is True:
        path = default_path(alpha, resize)
        if not os.path.exists(path):
            raise InputError(
                f"--pretrained: no weights at {path}; put a safetensors file with torchvision's names there, name a "
                "file with --pretrained FILE, or say --pretrained False for a network that has learnt nothing"
            )
        return read(path, ema=ema)
    assert isinstance(pretrained, str)
    return read(pretrained, ema=ema)


def default_path(alpha: float, resize: int) -> str:
    """Where the weights of a variant are looked for."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("MNV2_WEIGHTS") or os.path.join(cache, "mnv2")
    return os.path.join(folder, f"mobilenetv2_{alpha}_{resize}.safetensors")


def read(path: str, *, ema: bool = True) -> Weights:
    """Read a file of weights: safetensors, a state dict, or one of our checkpoints, known by content, not by name.

    ``ema`` takes a checkpoint's averaged weights where it has them.

    Raises:
        InputError: the file can't be read, or holds something else.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            raise InputError(f"--pretrained: expected a file, got {path}")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"--pretrained: can't read {path}: {error.strerror}") from None
    try:
        if start[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"--pretrained: {path} is no file of plain weights (nothing in it was run)") from None
    except Exception as error:  # a damaged file can fail anywhere in its reader
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"--pretrained: {path} is damaged or no file of weights ({cause})") from None
    if not isinstance(content, dict):
        raise InputError(f"--pretrained: expected a state dict in {path}, got {type(content).__name__}")
    if isinstance(content.get("model"), dict):
        averaged = ema and isinstance(content.get("ema"), dict)
        weights = _weights(path, content["ema" if averaged else "model"])
        classes, config = content.get("classes"), content.get("config")
        names = classes if isinstance(classes, list) else ()
        if classes is not None and [type(name) for name in names] != [str] * weights.num_classes:
            raise InputError(f"--pretrained: expected {weights.num_classes} names in the classes of {path}")
        if isinstance(config, dict):
            weights = replace(weights, padding=config.get("padding"), norm_eps=config.get("norm_eps"))
        return replace(weights, classes=classes, averaged=averaged)
    return _weights(path, content)


def _weights(path: str, state: Mapping[str, Tensor]) -> Weights:
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"--pretrained: expected a tensor for every name in {path}, but {name!r} is none")
        counter = name.endswith("num_batches_tracked")
        if value.layout != torch.strided or value.is_meta or not (counter or value.is_floating_point()):
            raise InputError(f"--pretrained: expected plain floats for {name} in {path}, got {value.dtype}")
    if _CLASSIFIER not in state or state[_CLASSIFIER].dim() != 2:
        names = ", ".join(list(state)[:3]) or "nothing"
        raise InputError(f"--pretrained: expected torchvision's names in {path}, {_CLASSIFIER} too, got {names} ...")
    return Weights(path, state)
