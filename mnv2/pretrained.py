"""The weights that a run asks for with ``--pretrained``, and what its network and pictures become with them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from .config import OPEN, NetworkConfig
from .distributed import World
from .download import DownloadError, fetch, find_file, offline_message, weights_folder
from .errors import InputError
from .model import MobileNetV2
from .registry import SOURCES, sources
from .weights import Weights, read, widths

ConfigT = TypeVar("ConfigT", bound=NetworkConfig)

ALONE = World()
ORIGINS = {source.origin for source in SOURCES}


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


def find(config: NetworkConfig, world: World = ALONE) -> Weights | None:
    """The weights that ``--pretrained`` asks for.

    None for False; a file or folder by its path; for True the best that is published of ``--alpha`` and ``--resize``,
    for the name of an origin that one's: from the weights folder, where one process of each machine of ``world`` puts
    it, if it isn't there yet and there is a network.

    Raises:
        InputError: the file is missing, damaged, no weights, or of another width than ``--alpha``; nothing is there of
            the variant, and the message says what to put where.
    """
    if config.pretrained is False:
        return None
    try:
        path = config.pretrained
        if path is True or (path in ORIGINS and not os.path.exists(path)):
            path = _published(config, world, None if path is True else path)
        weights = read(path, ema=getattr(config, "ema", True))
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from None
    if config.alpha is not None and weights.alpha is not None and widths(config.alpha) != widths(weights.alpha):
        raise InputError(f"--alpha: {path} is of a network with alpha {weights.alpha}, got {config.alpha}")
    return weights


def _published(config: NetworkConfig, world: World, origin: str | None) -> str:
    """The path of published weights in the weights folder, in each machine's."""
    alpha, folder = OPEN["alpha"] if config.alpha is None else config.alpha, weights_folder(config.weights_dir)
    hosts = world.gather(socket.gethostname())
    if hosts.index(hosts[world.rank]) == world.rank and not find_file(alpha, config.resize, folder, origin):
        _download(alpha, config.resize, folder, origin)
    world.wait()
    path = find_file(alpha, config.resize, folder, origin)
    if path is None:
        raise InputError(offline_message(alpha, config.resize, folder, "another process has put none there"))
    return path


def _download(alpha: float, resize: int, folder: str, origin: str | None) -> None:
    offered = [source for source in sources(alpha, resize) if source.conversion is None]
    offered = [source for source in offered if origin in (None, source.origin)]
    cause = f"{origin} publishes none that can be read" if origin else "none is published"
    if offered:
        try:
            fetch(offered[0], folder)
        except DownloadError as error:
            cause = error.cause
        else:
            return
    raise InputError(offline_message(alpha, resize, folder, cause))
