"""What commands have in common that serve what a network has learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .config import TrainedConfig
from .distributed import World
from .errors import InputError, RunError
from .fold import fold
from .inference import InferenceNetwork
from .model import MobileNetV2
from .precision import dtype
from .pretrained import build, find, follow
from .weights import Weights

ConfigT = TypeVar("ConfigT", bound=TrainedConfig)


def learnt(config: ConfigT, here: World, say: Callable[[str], None]) -> tuple[ConfigT, Weights]:
    """``config`` with what it leaves open decided by the weights that it asks for, and these.

    ``say`` is given a line for each decision of the user that isn't the weights' own.

    Raises:
        InputError: there are several processes; no weights are asked for; as ``find``.
    """
    if here.size > 1:
        raise InputError(f"expected one process, got {here.size}")
    weights = find(config, here)
    if weights is None:
        raise InputError("--pretrained: expected weights, got False, which is a network that has learnt nothing")
    return follow(config, weights, say), weights


def folded(model: MobileNetV2, kind: torch.dtype, remedy: str = "") -> InferenceNetwork:
    """``model`` with BatchNorm folded, in the precision asked for; RunError, with the ``remedy``, where it can't be."""
    try:
        return fold(model, kind)
    except ValueError as error:
        raise RunError(f"can't fold BatchNorm{remedy}: {error}") from None


def ready(config: TrainedConfig, here: World, weights: Weights, batch: int) -> InferenceNetwork:
    """The folded network of ``config`` and ``weights`` on its device, for batches of up to ``batch`` pictures.

    Raises:
        InputError: the weights don't fit.
        RunError: the network can't be folded.
    """
    network = folded(build(config, weights.num_classes, weights).to(here.device).eval(), dtype(config.precision))
    if here.device.type == "cuda":
        network.warmup(batch, config.resize)
    return network
