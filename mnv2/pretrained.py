"""The weights that a run asks for with ``--pretrained``, and what its network and pictures become with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from .config import OPEN, NetworkConfig
from .errors import InputError
from .model import MobileNetV2
from .weights import Weights, read, widths

ConfigT = TypeVar("ConfigT", bound=NetworkConfig)


def build(config: NetworkConfig, num_classes: int, weights: Weights | None, **settings: Any) -> MobileNetV2:
    """The network of ``config``, which ``follow`` gave, with ``num_classes`` outputs, and ``weights`` where given.

    ``settings`` are further ones of ``MobileNetV2``.

    Raises:
        InputError: the weights don't fit it.
    """
    given = {name: getattr(config, name) for name in ("alpha", "padding", "norm_eps", "backend")}
    model = MobileNetV2(num_classes=num_classes, **given, **settings)
    if weights is not None:
        weights.load_into(model)
    return model


def follow(config: ConfigT, weights: Weights | None, say: Callable[[str], None] | None = None) -> ConfigT:
    """``config`` with what it leaves open decided by ``weights``, or as usual where there are none.

    ``say`` is given a line for each decision of the user that isn't the weights' own.
    """
    known = weights.record() if weights is not None else {}
    decided: dict[str, Any] = {}
    for name, usual in OPEN.items():
        asked, own = getattr(config, name), known.get(name)
        decided[name] = next(value for value in (asked, own, usual) if value is not None)
        if say is not None and name != "alpha" and None not in (asked, own) and asked != own:
            say(f"--{name} {asked} is not what {known['source']}'s weights were made with ({own}): mind the accuracy")
    return replace(config, **decided)


def find(config: NetworkConfig) -> Weights | None:
    """The weights that ``--pretrained`` asks for: None for False, a file by its path, the weights folder for True.

    The weights folder is ``$MNV2_WEIGHTS``, else ``mnv2`` in the user's cache.

    Raises:
        InputError: the file is missing, damaged, no weights, or of another width than ``--alpha``; for True the message
            says where a file would go.
    """
    if config.pretrained is False:
        return None
    path = config.pretrained
    if path is True:
        path = default_path(OPEN["alpha"] if config.alpha is None else config.alpha, config.resize)
        if not os.path.exists(path):
            raise InputError(
                f"--pretrained: no weights at {path}; put a safetensors file with torchvision's names there, name a "
                "file with --pretrained FILE, or say --pretrained False for a network that has learnt nothing"
            )
    try:
        weights = read(path, ema=getattr(config, "ema", True))
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from None
    if config.alpha is not None and weights.alpha is not None and widths(config.alpha) != widths(weights.alpha):
        raise InputError(f"--alpha: {path} is of a network with alpha {weights.alpha}, got {config.alpha}")
    return weights


def default_path(alpha: float, resize: int) -> str:
    """Where the weights of a variant are looked for."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.environ.get("MNV2_WEIGHTS") or os.path.join(cache, "mnv2")
    return os.path.join(folder, f"mobilenetv2_{alpha}_{resize}.safetensors")
