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
from .errors import InputError, RunError
from .fold import fold
from .inference import InferenceNetwork
from .model import MobileNetV2
from .precision import dtype
from .registry import SOURCES, by_file_name, sources
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


def serving(config: NetworkConfig, world: World, weights: Weights, batch: int) -> InferenceNetwork:
    """The folded network of ``config`` and ``weights`` on its device, ready for batches of up to ``batch`` pictures.

    Raises:
        InputError: the weights don't fit.
        RunError: the network can't be folded.
    """
    model = build(config, weights.num_classes, weights).to(world.device).eval()
    try:
        network = fold(model, dtype(config.precision))
    except ValueError as error:
        raise RunError(f"can't fold BatchNorm: {error}") from None
    if world.device.type == "cuda":
        network.warmup(batch, config.resize)
    return network


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
    trained_at = known.get("resize")
    if say is not None and trained_at not in (None, config.resize):
        say(f"--resize {config.resize} is not what {known['source']}'s weights were made with ({trained_at})")
    return replace(config, **decided)


def find(config: NetworkConfig, world: World = ALONE) -> Weights | None:
    """The weights that ``--pretrained`` asks for.

    None for False; a file or folder by its path; for True the best that is published of ``--alpha`` and ``--resize``,
    for the name of an origin that one's, for a published file's name that file: from the weights folder, where one
    process of each machine of ``world`` puts it, if it isn't there yet and there is a network.

    Raises:
        InputError: the file is missing, damaged, no weights, or of another width than ``--alpha``; nothing is there of
            the variant, and the message says what to put where.
    """
    asked = config.pretrained
    if asked is False:
        return None
    try:
        if asked is True or (not os.path.exists(asked) and (asked in ORIGINS or by_file_name(asked))):
            path = _published(config, world)
        else:
            path = str(asked)
        weights = read(path, ema=getattr(config, "ema", True))
    except InputError as error:
        raise InputError(f"--pretrained: {error}") from None
    if config.alpha is not None and weights.alpha is not None and widths(config.alpha) != widths(weights.alpha):
        raise InputError(f"--alpha: {path} is of a network with alpha {weights.alpha}, got {config.alpha}")
    return weights


def _published(config: NetworkConfig, world: World) -> str:
    """The path of published weights in the weights folder, in each machine's."""
    hosts = world.gather(socket.gethostname())
    problem = None
    if hosts.index(hosts[world.rank]) == world.rank and not _path(config):
        problem = _download(config)
    if problem := next(filter(None, world.gather(problem)), None):
        raise InputError(problem)
    path = _path(config)
    if path is None:
        raise InputError(f"what was in {weights_folder(config.weights_dir)} just now is there no longer")
    return path


def _variant(config: NetworkConfig) -> tuple[float, int]:
    return OPEN["alpha"] if config.alpha is None else config.alpha, config.resize


def _path(config: NetworkConfig) -> str | None:
    """Where the weights lie in the weights folder, if they do."""
    folder, asked = weights_folder(config.weights_dir), config.pretrained
    if isinstance(asked, str) and asked not in ORIGINS:
        path = os.path.join(folder, asked)
        return path if os.path.exists(path) else None
    return find_file(*_variant(config), folder, asked if isinstance(asked, str) else None)


def _download(config: NetworkConfig) -> str | None:
    """Put what is asked for into the weights folder; what went wrong, and what to do instead."""
    folder, asked = weights_folder(config.weights_dir), config.pretrained
    named = by_file_name(asked) if isinstance(asked, str) else None
    offered = [named] if named else [source for source in sources(*_variant(config)) if source.conversion is None]
    if asked in ORIGINS:
        offered = [source for source in offered if source.origin == asked]
    if not offered:
        cause = f"{asked} publishes none that can be read" if asked in ORIGINS else "none is published"
        return offline_message(*_variant(config), folder, cause)
    try:
        fetch(offered[0], folder)
    except DownloadError as error:
        return str(error) if named else offline_message(*_variant(config), folder, error.cause)
    except (InputError, RunError) as error:
        return str(error)
    return None
