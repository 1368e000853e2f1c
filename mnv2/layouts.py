"""What other libraries call the tensors of MobileNetV2, and what their networks are beside the tensors.

A layout is known by its names alone, or by its files where these are its own. The networks have the same layers in the
same order, so that a layout is told by the names of its convolutions and norms, block by block, and by what the tensors
of these are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from . import keras_file, mindspore_file
from .labels import BACKGROUND_FIRST, LAST_UNUSED
from .model import BLOCKS

Pair = tuple[str, str]  # names of a convolution and of its norm


@dataclass(frozen=True)
class Layout:
    """The names of one library, and what is taken of its networks where a file doesn't say.

    ``modules`` are its modules by torchvision's names; where its names have had several rules, ``rename`` follows these
    instead. ``of_1001`` is the order that 1001 outputs have, one of ``labels.imagenet_orders``, or None where it isn't
    known.
    """

    source: str
    modules: Mapping[str, str] = field(default_factory=dict)
    padding: str = "symmetric"
    norm_eps: float = 1e-5
    preprocessing: str = "torchvision"
    of_1001: str | None = None
    rename: Callable[[str], str | None] | None = None

    def torchvision_name(self, name: str) -> str | None:
        """Torchvision's name of the tensor ``name``: ``name`` where it isn't known, None where it is no weight."""
        if self.rename is not None:
            return self.rename(name)
        module, _, leaf = name.rpartition(".")
        return f"{self.modules[module]}.{leaf}" if module in self.modules else name

    def own_name(self, name: str) -> str:
        """What this layout calls the tensor ``name`` of torchvision, whose name stands where several rules apply."""
        module, _, leaf = name.rpartition(".")
        own = {ours: theirs for theirs, ours in reversed(list(self.modules.items()))}
        return f"{own[module]}.{leaf}" if self.rename is None else name


def layout_of(names: Sequence[str]) -> Layout | None:
    """The layout that most of the modules with the tensors ``names`` belong to, None where it's none of ours."""
    modules = {name.rpartition(".")[0] for name in names}

    def shared(layout: Layout) -> int:
        return len(modules & layout.modules.keys())

    best = max(LAYOUTS, key=shared)
    return best if 2 * shared(best) > len(modules) else None


def _modules(stem: Pair, block: Callable[[int], list[Pair]], head: Pair, *classifiers: str) -> dict[str, str]:
    """Torchvision's modules by another layout's; ``block`` gives the pairs of a block in order, from number 1 on."""
    numbers = range(1, 1 + sum(repeats for _, _, repeats, _ in BLOCKS))
    ours = [_STEM, *(pair for number in numbers for pair in _torchvision_block(number)), _HEAD]
    theirs = [stem, *(pair for number in numbers for pair in block(number)), head]
    names = {their: our for pairs in zip(theirs, ours, strict=True) for their, our in zip(*pairs, strict=True)}
    return names | dict.fromkeys(classifiers, _CLASSIFIER)


_STEM, _HEAD, _CLASSIFIER = ("features.0.0", "features.0.1"), ("features.18.0", "features.18.1"), "classifier.1"


def _torchvision_block(number: int) -> list[Pair]:
    inner = f"features.{number}.conv"
    normed = 1 if number == 1 else 2  # the first block doesn't expand
    pairs = [(f"{inner}.{place}.0", f"{inner}.{place}.1") for place in range(normed)]
    return [*pairs, (f"{inner}.{normed}", f"{inner}.{normed + 1}")]


def _flat_block(number: int) -> list[Pair]:
    """As d-li14 and tonylins: convolution, norm and activation in one sequence."""
    return [(f"features.{number}.conv.{place}", f"features.{number}.conv.{place + 1}") for place in _places(number)]


def _places(number: int) -> tuple[int, ...]:
    return (0, 3) if number == 1 else (0, 3, 6)


def _timm_block(number: int) -> list[Pair]:
    stage, place = list(_stages())[number - 1]
    convolutions = ("conv_dw", "conv_pw") if number == 1 else ("conv_pw", "conv_dw", "conv_pwl")
    return [
        (f"blocks.{stage}.{place}.{convolution}", f"blocks.{stage}.{place}.bn{order}")
        for order, convolution in enumerate(convolutions, 1)
    ]


def _stages() -> Iterator[tuple[int, int]]:
    """Stage and place in it of each block."""
    for stage, (_, _, repeats, _) in enumerate(BLOCKS):
        yield from ((stage, place) for place in range(repeats))


def _transformers_pair(name: str) -> Pair:
    return f"mobilenet_v2.{name}.convolution", f"mobilenet_v2.{name}.normalization"


def _transformers_block(number: int) -> list[Pair]:
    inner = "conv_stem" if number == 1 else f"layer.{number - 2}"
    convolutions = ("conv_3x3", "reduce_1x1") if number == 1 else ("expand_1x1", "conv_3x3", "reduce_1x1")
    return [_transformers_pair(f"{inner}.{convolution}") for convolution in convolutions]


TORCHVISION = Layout("torchvision", _modules(_STEM, _torchvision_block, _HEAD, _CLASSIFIER))
KERAS = Layout("keras", rename=keras_file.torchvision_name, padding="same", norm_eps=1e-3, preprocessing="tf")
MINDSPORE = Layout("mindspore", rename=mindspore_file.torchvision_name, preprocessing="reference", of_1001=LAST_UNUSED)
# Known by their tensors' names; the others by their files.
LAYOUTS = (
    TORCHVISION,
    Layout("tonylins", _modules(_STEM, _flat_block, _HEAD, "classifier", "classifier.1")),
    Layout("d-li14", _modules(_STEM, _flat_block, ("conv.0", "conv.1"), "classifier")),
    Layout(
        "timm",
        _modules(("conv_stem", "bn1"), _timm_block, ("conv_head", "bn2"), "classifier"),
        preprocessing="timm",
    ),
    Layout(
        "transformers",
        _modules(
            _transformers_pair("conv_stem.first_conv"),
            _transformers_block,
            _transformers_pair("conv_1x1"),
            "classifier",
        ),
        padding="same",
        norm_eps=1e-3,
        preprocessing="tf",
        of_1001=BACKGROUND_FIRST,
    ),
)
