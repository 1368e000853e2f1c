"""Commands on files of weights (see ``weights``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kernels.common import PADDINGS

from .atomic import check_place
from .config import PREPROCESSING
from .errors import InputError, exit_status
from .flags import option, parse
from .registry import by_digest, listing
from .weights import Weights, classes_in_words, read

PROGRAM = "mnv2.weights"
_OVERRIDES = ("padding", "norm_eps", "preprocessing")
_ANY = "weights in any layout: a file, or a folder of transformers or timm"


@dataclass(frozen=True)
class InspectConfig:
    """What is told of a file."""

    file: str = option(None, _ANY, positional=True, metavar="FILE")
    tensors: bool = option(False, "list names, shapes and types too", action="store_true")
    ema: bool = option(True, "take a checkpoint's averaged weights where it has them")


@dataclass(frozen=True)
class ConvertConfig:
    """What is written from what."""

    source: str = option(None, _ANY, positional=True, metavar="SRC")
    destination: str = option(None, "safetensors file to write", positional=True, metavar="DST")
    padding: str | None = option(None, "in place of what the file or its layout says", choices=PADDINGS)
    norm_eps: float | None = option(None, "in place of what the file or its layout says", also=("--eps",))
    preprocessing: str | None = option(None, "in place of what the file or its layout says", choices=PREPROCESSING)
    ema: bool = option(True, "take a checkpoint's averaged weights where it has them")

    def __post_init__(self) -> None:
        """Check every value that doesn't need the files to be looked at."""
        if self.norm_eps is not None and not 0 < self.norm_eps < 1:
            raise InputError(f"--norm_eps: expected a number over 0 and under 1, got {self.norm_eps}")


def described(weights: Weights) -> str:
    """Lines that say what ``weights`` are."""

    def origin(name: str) -> str:
        return f"{name} (usual)" if name in weights.assumed else name

    rows: dict[str, Any] = {
        "file": weights,
        "from": weights.source,
        "SHA-256 of the first": weights.sha256,
        "alpha": weights.alpha,
        "parameters": f"{sum(t.numel() for name, t in weights.state.items() if _learnt(name)):,}",
        "outputs": weights.num_classes,
        origin("classes"): classes_in_words(weights.classes),
        origin("padding"): weights.padding,
        origin("norm_eps"): weights.norm_eps,
        origin("preprocessing"): weights.preprocessing or (weights.wants and f"no profile: {weights.wants}"),
        "resize": weights.resize,
    }
    source = by_digest(weights.sha256) if weights.sha256 else None
    if source is not None:
        rows["published"] = (
            f"{source.name}, top-1 {source.accuracy.top1}%, top-5 {source.accuracy.top5}% ({source.page})"
        )
    lines = [f"{name:22} {'not recorded' if value is None else value}" for name, value in rows.items()]
    if weights.assumed:
        lines.append("usual: not told by the file, and taken as networks with this layout have it")
    return "\n".join(lines)


def _learnt(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def inspect(config: InspectConfig) -> None:
    """Print what a file holds."""
    weights = read(config.file, ema=config.ema)
    print(described(weights))
    if config.tensors:
        for name, tensor in weights.state.items():
            print(f"{name:40} {tuple(tensor.shape)!s:20} {str(tensor.dtype).removeprefix('torch.')}")


def convert(config: ConvertConfig) -> None:
    """Write a file's weights with torchvision's names and their record.

    Raises:
        InputError: the destination exists.
    """
    if os.path.lexists(config.destination):
        raise InputError(f"DST: expected a new file, and {config.destination} exists")
    check_place("DST", config.destination)
    weights = read(config.source, ema=config.ema)
    given = {name: getattr(config, name) for name in _OVERRIDES if getattr(config, name) is not None}
    weights = replace(weights, **given, assumed=tuple(name for name in weights.assumed if name not in given))
    weights.save(config.destination)
    print(described(weights))
    print(f"written to {config.destination}, {os.path.getsize(config.destination):,} bytes")


@dataclass(frozen=True)
class ListConfig:
    """Which published weights are listed."""

    alpha: float | None = option(None, "width multiplier; None for all")
    resize: int | None = option(None, "side of the network's input in pixels; None for all")


def list_published(config: ListConfig) -> None:
    """Print what is published."""
    print(listing(config.alpha, config.resize))


COMMANDS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "convert": (ConvertConfig, convert, "Write weights as safetensors with torchvision's names and a record."),
    "inspect": (InspectConfig, inspect, "Tell what a file of weights holds."),
    "list": (ListConfig, list_published, "List the weights that are published, and by whom."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        asked = words[:1] in (["--help"], ["-h"])
        lines = [f"python -m {PROGRAM} COMMAND ... (--help behind a command lists its flags)"]
        lines += [f"  {name:8} {description}" for name, (_, _, description) in COMMANDS.items()]
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    kind, command, description = COMMANDS[words[0]]
    config: Any = parse(kind, words[1:], description, program=f"{PROGRAM} {words[0]}")
    return exit_status(PROGRAM, lambda: command(config))
