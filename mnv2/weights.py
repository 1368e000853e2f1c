"""Weights of MobileNetV2 from anybody's file, and the network that they are of.

    python -m mnv2.weights convert SRC DST.safetensors
    python -m mnv2.weights inspect FILE
    python -m mnv2.weights list

Whatever the layout, what comes out has torchvision's names, and a record of what the network and its pictures must be
for the published accuracy: width, classes and their order, padding, epsilon, preprocessing. Nothing that a file holds
is run; a file whose names or shapes aren't MobileNetV2's is refused by the first that doesn't fit.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.common import PADDINGS

from . import weight_files
from .atomic import write_safetensors
from .config import OPEN, PREPROCESSING
from .errors import InputError
from .labels import IMAGENET, imagenet_orders
from .layouts import LAYOUTS, TORCHVISION, Layout, layout_of
from .model import VARIANTS, MobileNetV2, layer_shapes
from .published import Source
from .registry import by_digest

_CLASSIFIER = "classifier.1."
# Looked for in this order where a file doesn't say: what is published, and then what users train.
_ALPHAS = (*VARIANTS, 0.25, 0.1, *(step / 20 for step in range(1, 61)))
_WIDTHS = (
    "features.0.0.weight",
    "features.1.conv.1.weight",
    *(f"features.{block}.conv.2.weight" for block in range(2, 18)),
    "features.18.0.weight",
)


@dataclass(frozen=True)
class Weights:
    """A state dict in torchvision's names, and what its network must be; what isn't known is None.

    Args:
        path: the file or folder.
        state: the tensors.
        source: whose they were: the layout of their first file, "mnv2" for our own checkpoints.
        alpha: width multiplier.
        resize: side in pixels of the pictures that it was trained with.
        classes: their names by number, empty for an output without a class.
        padding: as in ``MobileNetV2``.
        norm_eps: epsilon of every BatchNorm.
        preprocessing: evaluation's profile (``data.profile``).
        sha256: of their first file.
        averaged: these are a checkpoint's averaged weights.
        assumed: fields that the file doesn't tell and the layout's networks have.
        wants: in words, how pictures are prepared where no profile does that.
    """

    path: str
    state: Mapping[str, Tensor]
    source: str = TORCHVISION.source
    alpha: float | None = None
    resize: int | None = None
    classes: list[str] | None = None
    padding: str | None = None
    norm_eps: float | None = None
    preprocessing: str | None = None
    sha256: str = ""
    averaged: bool = False
    assumed: tuple[str, ...] = ()
    wants: str | None = None

    def __str__(self) -> str:
        """The file, and whether these are a checkpoint's averaged weights."""
        return self.path + (" (the average)" if self.averaged else "")

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier."""
        return len(self.state[_CLASSIFIER + "weight"])

    def about(self) -> str:
        """The file, whose weights it holds, and what it doesn't tell and is taken as usual there."""
        shown = {name: getattr(self, name) for name in self.assumed} | {"classes": classes_in_words(self.classes)}
        assumed = ", ".join(f"{name} {shown[name]}" for name in self.assumed)
        return f"{self}, from {self.source}" + (f", where it's usual: {assumed}" if assumed else "")

    def load_into(self, model: MobileNetV2, *, classifier: bool = True) -> None:
        """Copy the weights into ``model``; without ``classifier`` its own stays.

        Raises:
            InputError: a name or a shape doesn't fit; the first that doesn't is told.
        """
        wanted = model.state_dict()
        state = dict(self.state)
        if not classifier:
            state.update({name: tensor for name, tensor in wanted.items() if name.startswith(_CLASSIFIER)})
        for name, tensor in wanted.items():
            if name not in state:
                raise InputError(f"{self.path} lacks {name}, which MobileNetV2 needs")
            if state[name].shape != tensor.shape:
                raise InputError(
                    f"{self.path} holds {name} of shape {tuple(state[name].shape)}, but the network with --alpha "
                    f"{model.alpha} and {model.num_classes} classes has {tuple(tensor.shape)}"
                )
        for name in state:
            if name not in wanted:
                raise InputError(f"{self.path} holds {name}, which MobileNetV2 doesn't have")
        model.load_state_dict(state)

    def check_apart(self, argument: str, path: str) -> None:
        """Raise InputError, in the name of ``argument``, where the file ``path`` is one of the weights' own."""
        own = [self.path]
        if os.path.isdir(self.path):
            own = [entry.path for entry in os.scandir(self.path) if os.path.exists(entry.path)]  # no links to nowhere
        if os.path.exists(path) and any(os.path.samefile(path, file) for file in own):
            raise InputError(f"{argument}: expected another file than the weights' own, got {path}")

    def record(self) -> dict[str, Any]:
        """What is known beside the tensors and the path."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("path", "state", "averaged")
        }

    def save(self, path: str) -> None:
        """Write tensors and record to the safetensors file ``path``, all of it or nothing; ``read`` gives both back.

        Raises:
            RunError: it can't be written; what was there before still is.
        """
        write_safetensors(path, self.state, {"format": weight_files.FORMAT, "record": json.dumps(self.record())})


def classes_in_words(classes: Sequence[str] | None) -> str:
    """Which classes these are, in few words."""
    if classes is None:
        return "not recorded"
    shown = ", ".join(classes[:3]) + ", ..." * (len(classes) > 3)
    order = next((order for order, names in imagenet_orders().items() if names == list(classes)), None)
    return f"{len(classes)}: {shown}" if order is None else "ImageNet-1k's" + f", {order}" * (order != IMAGENET)


def load(
    path: str, *, padding: str | None = None, norm_eps: float | None = None, backend: str = "auto", ema: bool = True
) -> MobileNetV2:
    """The network of the file or folder ``path``, in evaluation, on the CPU.

    Args:
        path: weights in any layout and container that ``read`` takes.
        padding: in place of what the file or its layout says.
        norm_eps: likewise.
        backend: as in ``MobileNetV2``.
        ema: take averaged weights where there are some.

    Raises:
        InputError: the file can't be read or isn't MobileNetV2's; the message names the first key that doesn't fit.
        ValueError: an argument is out of its range.
    """
    weights = read(path, ema=ema)
    settings: dict[str, Any] = {"alpha": weights.alpha, "padding": weights.padding, "norm_eps": weights.norm_eps}
    settings |= {name: value for name, value in (("padding", padding), ("norm_eps", norm_eps)) if value is not None}
    known = {name: value for name, value in settings.items() if value is not None}
    model = MobileNetV2(num_classes=weights.num_classes, backend=backend, **known)
    weights.load_into(model)
    return model.eval()


def read(path: str, *, ema: bool = True) -> Weights:
    """Read weights of MobileNetV2 in any layout of ``layouts``.

    Args:
        path: a safetensors file, torch's of a state dict or of a checkpoint, MindSpore's, Keras's, or a folder of
            transformers or timm, known by content, not by name.
        ema: take averaged weights where there are some.

    Raises:
        InputError: it can't be read, is damaged, or isn't MobileNetV2's; the first key that doesn't fit is told.
    """
    content = weight_files.read(path, ema=ema)
    layout = content.layout or layout_of(list(content.tensors))
    if layout is None:
        names = ", ".join(list(content.tensors)[:3]) or "nothing"
        layouts = ", ".join(layout.source for layout in LAYOUTS)
        raise InputError(f"{path}: expected MobileNetV2's tensors by the names of {layouts}, got {names} ...")
    state, own_names = _renamed(path, content.tensors, layout)
    record = _checked_record(path, content.record, outputs=len(state[_CLASSIFIER + "weight"]))
    if record.get("alpha") is None:
        record["alpha"] = _alpha(state)
    state = _checked(path, state, own_names, layout, record["alpha"])
    weights = Weights(path, state, layout.source, sha256=content.sha256, averaged=content.averaged)
    published = by_digest(record.get("sha256") or content.sha256)
    usual = _usual(layout, weights.num_classes)
    if published is not None and len(imagenet_orders()[published.classes]) == weights.num_classes:
        usual = _published(published)
    missing = {name: value for name, value in usual.items() if name not in record}
    if "source" not in usual and "assumed" not in record:
        missing["assumed"] = tuple(missing)
    return replace(weights, **missing, **record)


def _published(source: Source) -> dict[str, Any]:
    """What the publisher says of the network."""
    names = ("resize", "padding", "norm_eps", "preprocessing")
    return {name: getattr(source, name) for name in names} | {
        "source": source.origin,
        "classes": imagenet_orders()[source.classes],
    }


def _usual(layout: Layout, outputs: int) -> dict[str, Any]:
    """What networks of ``layout`` have where their files don't say."""
    usual: dict[str, Any] = {name: getattr(layout, name) for name in ("padding", "norm_eps", "preprocessing")}
    if layout is TORCHVISION:
        return usual  # its names are everybody's, whose classes may be any
    for order in (IMAGENET, layout.of_1001):
        if order is not None and len(imagenet_orders()[order]) == outputs:
            usual["classes"] = imagenet_orders()[order]
    return usual


def _renamed(path: str, tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``tensors`` by torchvision's names, in fp32, and their own names by these."""
    state: dict[str, Tensor] = {}
    own_names: dict[str, str] = {}
    for name, tensor in tensors.items():
        ours = layout.torchvision_name(name)
        if ours is None:
            continue
        if ours in state:
            raise InputError(f"{path} holds {name} beside {own_names[ours]}, which means the same")
        state[ours], own_names[ours] = tensor.float() if tensor.is_floating_point() else tensor, name
    classifier = _CLASSIFIER + "weight"
    if classifier not in state or state[classifier].dim() == 0:
        raise InputError(f"{path} lacks {layout.own_name(classifier)}: expected weights with a classifier")
    if state[classifier].shape[2:] == (1, 1):  # a convolution
        state[classifier] = state[classifier].flatten(1)
    return state, own_names


def _checked(
    path: str, state: Mapping[str, Tensor], own_names: Mapping[str, str], layout: Layout, alpha: float
) -> dict[str, Tensor]:
    """``state`` in the order of the network of width ``alpha``, whose every tensor it must have."""
    with torch.device("meta"):
        wanted = MobileNetV2(alpha, max(1, len(state[_CLASSIFIER + "weight"]))).state_dict()
    whose = f"MobileNetV2 in {layout.source}'s layout"
    if more := [own_names[name] for name in state if name not in wanted]:
        raise InputError(f"{path} holds {more[0]}, which {whose} doesn't have")
    checked = {}
    for name, expected in wanted.items():
        if name not in state:
            if not name.endswith("num_batches_tracked"):
                raise InputError(f"{path} lacks {layout.own_name(name)}, which {whose} has")
            checked[name] = torch.zeros((), dtype=torch.int64)  # not all count batches
            continue
        tensor, own = state[name], own_names[name]
        if expected.is_floating_point() and not tensor.is_floating_point():
            raise InputError(f"{path}: expected plain floats for {own}, got {tensor.dtype}")
        if tensor.shape != expected.shape:
            shape, alike = tuple(tensor.shape), sorted(tensor.shape) == sorted(expected.shape)
            raise InputError(
                f"{path} holds {own} of shape {shape}{' (transposed?)' * alike}, expected {tuple(expected.shape)} at "
                f"alpha {alpha}"
            )
        if not tensor.isfinite().all() or (name.endswith("running_var") and tensor.min() < 0):
            raise InputError(f"{path} holds {own} with numbers that aren't finite, or variances under 0")
        checked[name] = tensor
    return checked


def _checked_record(path: str, record: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """``record`` with every value of the kind that ``Weights`` has."""

    def number(value: Any, most: float) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= most

    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    def word(value: Any) -> bool:
        return isinstance(value, str) and value.isprintable()

    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "alpha": ("a number over 0, at most 100", lambda value: number(value, 100)),
        "resize": ("pixels", lambda value: isinstance(value, int) and number(value, 8192)),
        "classes": (f"{outputs} names", lambda value: names(value) and len(value) == outputs),
        "padding": (" or ".join(PADDINGS), PADDINGS.__contains__),
        "norm_eps": ("a number over 0 and under 1", lambda value: number(value, 1) and value < 1),
        "preprocessing": (" or ".join(PREPROCESSING), PREPROCESSING.__contains__),
        "source": ("a name", word),
        "sha256": ("64 digits", lambda value: word(value) and re.fullmatch("([0-9a-f]{64})?", value) is not None),
        "assumed": ("fields", lambda value: names(value) and set(value) <= {*OPEN, "classes"}),
        "wants": ("a printable line", word),
    }
    if not isinstance(record, Mapping):
        raise InputError(f"{path}: expected a record of {', '.join(checks)}, got {str(record)[:50]}")
    for name, value in record.items():
        if name not in checks:
            raise InputError(f"{path}: expected a record of {', '.join(checks)}, got {name!r}")
        expected, holds = checks[name]
        if value is not None and not holds(value):
            raise InputError(f"{path}: expected {expected} as its record of {name}, got {ascii(str(value)[:50])[1:-1]}")
    assumed = {"assumed": tuple(record["assumed"])} if record.get("assumed") is not None else {}
    return {**record, **assumed}


def _alpha(state: Mapping[str, Tensor]) -> float:
    """The width multiplier of a network with the widths of ``state``, a published one if it has them; else the nearest.

    Others of the same widths make the same network.
    """
    found = [len(state[name]) if name in state and state[name].dim() else 0 for name in _WIDTHS]

    def shared(alpha: float) -> int:
        return sum(map(operator.eq, found, widths(alpha)))

    best = max(_ALPHAS, key=shared)
    if shared(best) == len(found):
        return best
    about = found[-2] / widths(1.0)[-2]  # of the last block, to half of a multiple of 8
    finer = (round(about + step / 10000, 4) for step in range(-300, 301))
    return max((best, *(alpha for alpha in finer if 0 < alpha <= 100)), key=shared)


def widths(alpha: float) -> list[int]:
    """Outputs of stem, blocks and head of the network of width ``alpha``."""
    return [shape.c_out for shape in layer_shapes(alpha)[:-1]]


if __name__ == "__main__":
    from mnv2.weights_command import main  # which imports this module by its name

    sys.exit(main())
