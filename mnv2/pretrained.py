"""The weights that a run asks for with ``--pretrained``, and what its network and pictures become with them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from .config import OPEN, NetworkConfig
from .distributed import World
from .download import DownloadError, fetch, find_file, offline_message, weights_folder
from .errors import InputError, RunError
from .model import MobileNetV2
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


def follow(config: ConfigT, weights: Weights | None, say: Callable[[str], None] | None = None) -> ConfigT:
    """``config`` with what it leaves open decided by ``weights``, or as usual where there are none.

    ``say`` is given a line for each decision of the user that isn't the weights' own.
    """
    if weights is None:
        return replace(config, **{name: value for name, value in OPEN.items() if getattr(config, name) is None})
    decided: dict[str, Any] = {}
    for name, usual in OPEN.items():
        asked, own = getattr(config, name), getattr(weights, name)
        decided[name] = next(value for value in (asked, own, usual) if value is not None)
        if say is None or name == "alpha":
            continue
        if None not in (asked, own) and asked != own:
            had = "is usual for weights from" if name in weights.assumed else "was recorded with weights from"
            say(f"--{name} {asked} goes, where {own} {had} {weights.source}: mind the accuracy")
        if asked is None and own is None:
            said = f"asks for {weights.wants}, which no profile is" if weights.wants else "doesn't say what it wants"
            say(f"--{name} {usual} is taken, since {weights.path} {said}")
    if say is not None and weights.resize not in (None, config.resize):
        say(f"--resize {config.resize} goes, where {weights.path} was trained with {weights.resize}")
    return replace(config, **decided)


def find(config: NetworkConfig, world: World = ALONE) -> Weights | None:
    """The weights that ``--pretrained`` asks for.

    None for False; a file or folder by its path; for True the first of ``registry.sources`` that can be read, for an
    origin's name the first of that one's, for a published file's name that file: from the weights folder, where one
    process of each machine of ``world`` puts it, if it isn't there yet and there is a network.

    Raises:
        InputError: the file is missing, damaged, no weights, or of another width than ``--alpha``; nothing is there of
            the variant, and the message says what to put where.
    """
    if config.pretrained is False:
        return None
    hosts, there = zip(*world.gather((socket.gethostname(), _is_path(config))), strict=True)
    try:
        if len(set(there)) > 1:
            raise InputError(
                f"{config.pretrained} is a file for some processes, and none on {hosts[there.index(False)]}"
            )
        published = None if there[0] else _published(config, hosts, world)
        if published is None and not os.path.exists(path := str(config.pretrained)) and path.isalnum():
            raise InputError(f"expected a file, a folder, or one of {', '.join(sorted(ORIGINS))}, got {path}")
        weights = read(published or str(config.pretrained), ema=getattr(config, "ema", True))
        if published is not None:
            weights = _as_published(weights)
        problem, digest = None, weights.sha256
    except InputError as error:
        problem, digest = f"--pretrained: {error}", ""
    problems, digests = zip(*world.gather((problem, digest)), strict=True)  # all go on alike, or none does
    if problem := next(filter(None, problems), None):
        raise InputError(problem)
    if len(set(digests)) > 1:
        raise InputError(f"--pretrained: expected the same weights for all processes, got others on some of {hosts}")
    if config.alpha is not None and weights.alpha is not None and widths(config.alpha) != widths(weights.alpha):
        raise InputError(f"--alpha: {weights.path} is of a network with alpha {weights.alpha}, got {config.alpha}")
    return weights


def _is_path(config: NetworkConfig) -> bool:
    """Whether a file or folder is asked for by its path, not what is published by its name."""
    asked = config.pretrained
    if not isinstance(asked, str):
        return False
    return os.path.exists(asked) or not (asked in ORIGINS or by_file_name(asked))


def _as_published(weights: Weights) -> Weights:
    """``weights`` with the resolution that their name tells; InputError where they are known not to be what it says."""
    source = by_file_name(os.path.basename(weights.path))
    if source is None:
        return weights
    if source.weights.sha256 and not weights.sha256.startswith(source.weights.sha256):
        raise InputError(
            f"{weights.path} isn't what {source.origin} publishes under that name: expected SHA-256 "
            f"{source.weights.sha256}, got {weights.sha256}; remove it, or name it by its path"
        )
    return weights if weights.resize is not None else replace(weights, resize=source.resize)


def _published(config: NetworkConfig, hosts: Sequence[str], world: World) -> str:
    """The path of published weights in the weights folder, in each machine's; ``hosts`` are the processes'."""
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
    origin = asked if isinstance(asked, str) and asked in ORIGINS else None
    if origin:
        offered = [source for source in offered if source.origin == origin]
    if not offered:
        cause = f"{origin} publishes none that can be read" if origin else "none is published"
        return offline_message(*_variant(config), folder, cause, origin)
    try:
        fetch(offered[0], folder)
    except DownloadError as error:
        return str(error) if named else offline_message(*_variant(config), folder, error.cause, origin)
    except (InputError, RunError) as error:
        return str(error)
    return None
