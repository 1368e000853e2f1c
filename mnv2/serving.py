"""How the commands begin that serve what a network has learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .config import TrainedConfig
from .distributed import World
from .errors import InputError
from .pretrained import find, follow
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
