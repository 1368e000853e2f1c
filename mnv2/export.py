"""A trained network as a file for other runtimes.

    python -m mnv2.export --pretrained WEIGHTS --format onnx|torch|safetensors [--output FILE] [--fold True|False]

onnx is ONNX's standard operators, and torch the .pt2 of torch.export, which loads without mnv2; both take any number of
pictures, and with `--dynamic_size` of any size. safetensors holds the weights for mnv2 itself. Each file says what it
holds: width, classes, padding, and how pictures are prepared. It is run once as its users will run it, beside the
trained network in fp64, and takes its place only where both agree. `--help` lists the flags.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .atomic import check_place, replacing
from .config import OPEN, TrainedConfig
from .data import profile
from .distributed import World, world
from .errors import InputError, RunError, exit_status
from .flags import option, parse
from .formats import FORMATS, Exported, Run, check_format, onnx_packages
from .labels import class_names
from .model import MobileNetV2
from .precision import dtype, numerics
from .pretrained import build
from .serving import learnt
from .weights import Weights

# How far logits may be from those of the trained network in fp64, as a share of the largest. Rounding alone takes a
# trained network to a hundredth of the first and a tenth of the second, and a wrong layer to more than either.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2}


@dataclass(frozen=True)
class ExportConfig(TrainedConfig):
    """What is exported, and how."""

    format: str = option("onnx", "kind of file: ONNX, torch.export's .pt2, or safetensors", choices=tuple(FORMATS))
    output: str | None = option(
        None,
        "file to write, or to replace; None for mobilenetv2_ALPHA_RESIZE and the format's extension, here, if there is "
        "none of that name",
        metavar="FILE",
    )
    fold: bool = option(True, "fold BatchNorm into the convolutions")
    dynamic_size: bool = option(False, "pictures of any height and width in place of --resize")
    precision: str = option("fp32", "of weights, pictures and logits", choices=("fp32", "fp16"))
    batch_size: int = option(3, "pictures of the second batch that the file is checked with; the first has one")
    backend: str = option("auto", "what a folded safetensors file says of how blocks run", choices=("auto", "torch"))
    device: str = option("auto", "where the file is made and checked: the CPU", choices=("auto", "cpu"))

    def __post_init__(self) -> None:
        """Check every value that doesn't need the weights to be looked at."""
        super().__post_init__()
        check_format(self.format, padding=self.padding, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What ``export`` and ``check_format`` take of the file."""
        return {
            "resize": self.resize,
            "fold": self.fold,
            "dtype": dtype(self.precision),
            "dynamic_size": self.dynamic_size,
        }

    @property
    def place(self) -> str:
        """Path of the file."""
        # Folded weights have another name than those that --pretrained True looks for.
        kind = "_folded" if self.format == "safetensors" and self.fold else ""
        return self.output or f"mobilenetv2_{self.alpha}_{self.resize}{kind}{FORMATS[self.format].extension}"


class Agreement(NamedTuple):
    """How a file's logits compare with the trained network's in fp64, on made-up pictures.

    ``difference`` is the largest, ``largest`` the network's largest logit, ``tolerance`` the share of it that a
    difference may be. ``same`` of ``pictures`` have the same class first; ``tied`` have another, whose logit is behind
    in the network too by no more than a difference may be.
    """

    difference: float
    largest: float
    tolerance: float
    same: int
    tied: int
    pictures: int

    @property
    def allowed(self) -> float:
        """The most that a logit may differ by."""
        return self.tolerance * self.largest

    @property
    def holds(self) -> bool:
        """Whether the file is right."""
        return self.difference <= self.allowed and self.same + self.tied == self.pictures

    def __str__(self) -> str:
        """The figures, on one line."""
        share = self.difference / self.largest if self.largest else self.difference
        tied = f", tied to within {self.allowed:.2g} for {self.tied}" if self.tied else ""
        return (
            f"logits differ by at most {self.difference:.2g}, {share:.2g} of the largest ({self.tolerance:g} is "
            f"allowed), top-1 is the same for {self.same} of {self.pictures} pictures{tied}"
        )


@torch.no_grad()
def export(
    model: MobileNetV2,
    path: str,
    format: str = "onnx",
    *,
    resize: int = 224,
    fold: bool = True,
    dtype: torch.dtype = torch.float32,
    dynamic_size: bool = False,
    batch_size: int = 3,
    about: Mapping[str, Any] | None = None,
) -> Agreement:
    """Write ``model``, in evaluation, to the file ``path``, and check it by running it; ``model`` stays as it is.

    Args:
        model: what has been trained, on any device.
        path: of the file, which is replaced where it is there.
        format: "onnx", "torch" or "safetensors"; pictures ``[batch, 3, H, W]`` give logits ``[batch, classes]``.
        resize: side of the pictures in pixels.
        fold: fold BatchNorm into the convolutions, in fp64 and rounded once; else it is kept.
        dtype: fp32 or fp16, of weights, pictures and logits.
        dynamic_size: pictures of any size from 33 pixels a side, with symmetric padding.
        batch_size: pictures of the second batch of the check; the first has one.
        about: what the file tells of itself beside what this call does: any names, and values that JSON has. Unfolded
            safetensors take what ``Weights`` records, its ``resize`` by the name ``trained_at``, and no more.

    Raises:
        InputError: an argument is wrong, or a package is missing.
        TypeError, ValueError: as ``mnv2.fold``: it is another network, or a weight leaves the range of ``dtype``.
        RunError: the file can't be written, or disagrees with the network; what was there before still is.
    """
    if not isinstance(model, MobileNetV2):
        raise TypeError(f"model: expected a MobileNetV2, got {type(model).__name__}")
    check_format(format, padding=model.padding, fold=fold, dtype=dtype, dynamic_size=dynamic_size, resize=resize)
    if format == "onnx":
        onnx_packages()
    model = copy.deepcopy(model).cpu().eval()
    exported = Exported(model, resize, fold, dtype, dynamic_size, about or {})
    try:
        with replacing(path) as temporary:
            run = FORMATS[format].write(exported, temporary)
            found = compare(run, exported, batch_size)
            if not found.holds:
                raise RunError(f"{path} is not written, as {FORMATS[format].runtime} runs it wrongly: {found}")
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}") from None
    return found


def compare(run: Run, exported: Exported, batch_size: int) -> Agreement:
    """What ``run`` and the trained network in fp64 give for the same made-up pictures."""
    exact = copy.deepcopy(exported.model).double()
    exact.backend = "torch"
    batches = _made_up(exported, batch_size)
    expected = torch.cat([exact(pictures.double()) for pictures in batches])
    got = torch.cat([run(pictures).double() for pictures in batches])
    if got.shape != expected.shape:
        raise RunError(f"expected logits of shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    if not expected.isfinite().all():
        raise RunError("the network itself gives numbers that aren't finite for made-up pictures")
    first = got.argmax(1)
    same = first == expected.argmax(1)
    behind = expected.amax(1) - expected.gather(1, first[:, None]).squeeze(1)
    found = Agreement(
        difference=(got - expected).abs().max().item(),
        largest=expected.abs().max().item(),
        tolerance=TOLERANCES[exported.dtype],
        same=int(same.sum()),
        tied=0,
        pictures=len(expected),
    )
    return found._replace(tied=int((~same & (behind <= found.allowed)).sum()))


def _made_up(exported: Exported, batch_size: int) -> list[Tensor]:
    """Batches of one and of several pictures; where any size will do one of another, the parity of its sides too."""
    side = exported.resize
    shapes = [(1, 3, side, side), (batch_size, 3, side, side)]
    if exported.dynamic_size:
        shapes.append((1, 3, side + 1, side + 17))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(exported.dtype) for shape in shapes]


def record(config: ExportConfig, weights: Weights) -> dict[str, Any]:
    """What is known of the weights and their pictures, as ``config`` decided; what isn't is left out.

    The side of the pictures that they were trained with is ``trained_at``: ``resize`` is that of the file's.
    """
    known = weights.record() | {name: getattr(config, name) for name in OPEN}
    known["assumed"] = tuple(name for name in weights.assumed if known[name] == getattr(weights, name))
    known["trained_at"] = known.pop("resize")
    return {name: value for name, value in known.items() if value is not None}


def preparation(name: str, resize: int) -> dict[str, Any]:
    """How ``name`` makes an input of a picture: the resize, then the crop, then (pixel - mean) / std."""
    wanted = profile(name, resize)
    scaled = {"mean": wanted.mean, "std": wanted.std}
    return {
        "layout": "NCHW",
        "channels": "RGB",
        "resize_short_side_to": wanted.shorter,
        "resize_filter": "bicubic" if wanted.cubic else "bilinear",
        "resize_antialias": True,
        "centre_crop": wanted.resize,
        **{f"{kind}_of_pixels_0_to_255": [round(value, 6) for value in values] for kind, values in scaled.items()},
        **{f"{kind}_of_pixels_0_to_1": [round(value / 255, 6) for value in values] for kind, values in scaled.items()},
    }


def check_output(config: ExportConfig, weights: Weights) -> None:
    """Raise InputError where the file can't be written, or another would be lost unasked."""
    check_place("--output", config.place)
    if not os.path.exists(config.place):
        return
    if config.output is None:
        raise InputError(f"--output: {config.place} is there already; name it with --output to replace it")
    weights.check_apart("--output", config.place)


def export_weights(config: ExportConfig, here: World) -> Iterator[str]:
    """Export the weights of ``config``; gives what is to be printed."""
    config, weights = learnt(config, here, partial(print, file=sys.stderr))
    check_output(config, weights)
    model = build(config, weights.num_classes, weights)
    about = {
        **record(config, weights),
        "weights": os.path.basename(weights.path),
        "class_names": class_names(weights.num_classes, weights.classes),
        "input": preparation(str(config.preprocessing), config.resize),
    }
    try:
        found = export(
            model,
            config.place,
            config.format,
            **config.settings,
            batch_size=config.batch_size,
            about=about,
        )
    except InputError:
        raise
    except ValueError as error:
        raise RunError(f"can't export in {config.precision}: {error}") from None
    kind, side = FORMATS[config.format], "any" if config.dynamic_size else config.resize
    yield (
        f"{config.place}: {kind.content}, {config.precision}, BatchNorm {'folded' if config.fold else 'kept'}, "
        f"{os.path.getsize(config.place) / 2**20:.2f} MiB"
    )
    yield (
        f"alpha {model.alpha}, pictures [batch, 3, {side}, {side}], {weights.num_classes} classes, "
        f"preprocessing {config.preprocessing}"
    )
    yield f"weights: {weights.about()}"
    yield (
        f"run by {kind.runtime} beside the trained network in fp64, made-up pictures in batches of 1 and "
        f"{config.batch_size}"
    )
    yield str(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(ExportConfig, argv, "A trained network as a file for other runtimes.", program="mnv2.export")

    def action() -> None:
        with numerics(config.deterministic), world("cpu") as here:
            for line in export_weights(config, here):
                print(line, flush=True)

    return exit_status("mnv2.export", action)


if __name__ == "__main__":
    sys.exit(main())
