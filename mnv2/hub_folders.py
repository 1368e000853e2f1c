"""Folders as transformers and timm write them: which file has the weights, and what the configurations say.

Only what a configuration says is told, or what its library takes where it says nothing; a network that isn't
MobileNetV2's is refused, whatever its weights look like. Where none of our profiles prepares pictures as it is asked
for, that is put into words.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from . import data
from .config import PREPROCESSING
from .errors import InputError
from .labels import BACKGROUND, BACKGROUND_FIRST, IMAGENET, imagenet_classes, imagenet_orders

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MOST_BYTES = 1 << 24  # of a configuration
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers
_TRANSFORMERS = {
    "num_channels": 3,
    "depth_divisible_by": 8,
    "expand_ratio": 6,
    "output_stride": 32,
    "first_layer_is_expansion": True,
    "hidden_act": "relu6",
}
# timm's arguments that change the network, at the values that leave it MobileNetV2; None is any.
_TIMM = {
    "act_layer": ("relu6",),
    "depth_multiplier": (1,),
    "fix_stem_head": (False,),
    "global_pool": ("avg",),
    "in_chans": (3,),
    "output_stride": (32,),
    "pad_type": ("", "same"),
    "stem_kernel_size": (3,),
    "bn_eps": None,
}
_TIMM_HARMLESS = {
    "bn_momentum",
    "drop_path_rate",
    "drop_rate",
    "exportable",
    "no_jit",
    "num_classes",
    "pretrained_strict",
    "scriptable",
}


def read(path: str) -> tuple[str, dict[str, Any]]:
    """The file of weights in the folder ``path``, and what its configurations say by the names of ``weights.Weights``.

    Raises:
        InputError: a file is missing, can't be read, is damaged, or is of another network; the message names it.
    """
    found = [name for name in WEIGHTS if os.path.isfile(os.path.join(path, name))]
    if not found:
        raise InputError(f"{path}: expected {' or '.join(WEIGHTS)} in the folder, got neither")
    config = _Object.read(os.path.join(path, CONFIG))
    if "architecture" in config.content:
        record = _timm(config)
    else:
        record = _transformers(config)
        processor = os.path.join(path, PROCESSOR)
        if os.path.exists(processor):
            record |= _transformers_preprocessing(_Object.read(processor), record.get("resize"))
    return os.path.join(path, found[0]), record


@dataclass(frozen=True)
class _Object:
    """An object of the file ``path``, whose values are checked as they are asked for; null is as good as absent."""

    path: str
    content: Mapping[str, Any]

    @classmethod
    def read(cls, path: str) -> _Object:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
                raise InputError(f"{path}: expected a file, got none")
            with open(path, "rb") as file:
                text = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise InputError(f"can't read {path}: {error.strerror}") from None
        if len(text) > _MOST_BYTES:
            raise InputError(f"{path}: expected at most {_MOST_BYTES} bytes, got more")
        try:
            content = json.loads(text.decode(), parse_constant=_no_number)
        except RecursionError:
            raise InputError(f"{path}: expected JSON, got something else (nested too deep)") from None
        except ValueError as error:
            raise InputError(f"{path}: expected JSON, got something else ({error})") from None
        if not isinstance(content, dict):
            raise InputError(f"{path}: expected an object, got {type(content).__name__}")
        return cls(path, content)

    def refuse(self, name: str, expected: str) -> NoReturn:
        got = self.content.get(name)
        shown = str(got)[:50] if got is None or isinstance(got, str | int | float) else f"a {type(got).__name__}"
        raise InputError(
            f"{self.path}: expected {name} {expected}, got {shown if shown.isprintable() else repr(shown)}"
        )

    def get(self, name: str, default: Any = None) -> Any:
        value = self.content.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.get(name, default)
        return value if _within(value, least, most) else self.refuse(name, f"a number from {least:g} to {most:g}")

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        return value if isinstance(value, bool) else self.refuse(name, "true or false")

    def word(self, name: str, default: str) -> str:
        value = self.get(name, default)
        fits = isinstance(value, str) and re.fullmatch(r"[\w.-]{1,60}", value)
        return value if fits else self.refuse(name, "one word")

    def colours(self, name: str, default: tuple[float, ...], least: float) -> tuple[float, ...]:
        """Three numbers, which one may stand for."""
        value = self.get(name, list(default))
        values = value if isinstance(value, list) else [value] * 3
        fits = len(values) == 3 and all(_within(each, least, 1e4) for each in values)
        return tuple(values) if fits else self.refuse(name, f"three numbers from {least:g} to 10000")

    def sides(self, name: str, default: dict[str, int]) -> dict[str, int]:
        """Pixels by the names of sides; a number without names stands for all of ``default``."""
        value = self.get(name, default)
        sides = value if isinstance(value, dict) else dict.fromkeys(default, value)
        known = {name: pixels for name, pixels in sides.items() if pixels is not None}
        fits = 0 < len(known) < 4 and all(re.fullmatch("[a-z_]{1,20}", name) and _pixels(known[name]) for name in known)
        return known if fits else self.refuse(name, "pixels")

    def object(self, name: str) -> _Object:
        value = self.get(name, {})
        return _Object(self.path, value) if isinstance(value, dict) else self.refuse(name, "an object")

    def classes(self, name: str) -> dict[str, list[str]]:
        """The classes by a list of names, or by names by number; ImageNet's WordNet ids where those are its names."""
        value = self.get(name, [])
        if isinstance(value, dict):
            if not all(re.fullmatch("0|[1-9][0-9]{0,4}", number) for number in value):
                self.refuse(name, "names by number")
            by_number = {int(number): each for number, each in value.items()}
            value = [by_number.get(number, "") for number in range(1 + max(by_number, default=-1))]
        if not isinstance(value, list) or not all(_class_name(each) for each in value):
            self.refuse(name, "a list of printable names, or names by number")
        names = [str(each) for each in value]
        generic = all(each == f"LABEL_{number}" for number, each in enumerate(names))  # transformers' own, for none
        return {} if generic else {"classes": _imagenet_ids(names) or names}


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _pixels(value: Any) -> bool:
    return isinstance(value, int) and _within(value, 1, 8192)


def _class_name(value: Any) -> bool:
    return (isinstance(value, str) and value.isprintable()) or (isinstance(value, int) and not isinstance(value, bool))


def _imagenet_ids(names: list[str]) -> list[str] | None:
    english = [names for _, names in imagenet_classes()]
    background = names[0].lower() == BACKGROUND
    if len(names) == len(english) + background and names[background].partition(",")[0] == english[0].partition(",")[0]:
        return imagenet_orders()[BACKGROUND_FIRST if background else IMAGENET]
    return None


@dataclass(frozen=True)
class _Evaluation:
    """What a configuration has done to a picture.

    ``mean`` and ``std`` are in units of 8-bit pixel values; ``resized`` is what the short side becomes, ``cropped`` the
    sides of the centre that is kept, both in words where it is something else.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    filter: str
    resized: int | str
    cropped: int | str

    def __str__(self) -> str:
        mean, std = (" ".join(f"{each / 255:.4g}" for each in values) for values in (self.mean, self.std))
        resized = f"short side {self.resized}" if isinstance(self.resized, int) else self.resized
        cropped = f"centre {self.cropped}" if isinstance(self.cropped, int) else self.cropped
        return f"mean {mean}, std {std}, {self.filter}, {resized}, {cropped}"

    def record(self, resize: int | None) -> dict[str, str | None]:
        """The profile that does the same at ``resize`` pixels, or words where none does."""
        # Several may; "reference" last, since the others' share of the picture is that of other sizes too.
        for name in sorted(PREPROCESSING, key="reference".__eq__):
            if resize is not None and self._is(name, resize):
                return {"preprocessing": name}
        return {"preprocessing": None, "wants": str(self)}

    def _is(self, name: str, resize: int) -> bool:
        profile = data.profile(name, resize)
        resized = {profile.shorter}
        if name == "tf":
            # The published accuracy is that of TF-Slim's 0.875 of the picture. Google's folders have size + 32 for it
            # at every size, and timm rounds down.
            resized |= {resize + 32, int(resize / 0.875)}
        return (
            self.cropped == resize
            and self.resized in resized
            and self.filter == ("bicubic" if profile.cubic else "bilinear")
            and all(
                math.isclose(got, wanted, abs_tol=0.01)
                for got, wanted in zip((*self.mean, *self.std), (*profile.mean, *profile.std), strict=True)
            )
        )


def _transformers(config: _Object) -> dict[str, Any]:
    """What transformers' configuration of a MobileNetV2 says of the network."""
    if config.get("model_type") != "mobilenet_v2":
        config.refuse("model_type", "mobilenet_v2")
    alpha = config.number("depth_multiplier", 1.0, 0.01, 100)
    # From 1 on the head is as wide either way.
    for name, value in (_TRANSFORMERS | ({"finegrained_output": True} if alpha < 1 else {})).items():
        if config.get(name, value) != value:
            config.refuse(name, str(value))
    record = {
        "alpha": alpha,
        "padding": "same" if config.flag("tf_padding", True) else "symmetric",
        "norm_eps": config.number("layer_norm_eps", 1e-3, 1e-12, 0.5),
    }
    size = config.get("image_size", 224)
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not (_pixels(height) and _pixels(width)):
        config.refuse("image_size", "pixels")
    return record | ({"resize": height} if height == width else {}) | config.classes("id2label")


def _transformers_preprocessing(processor: _Object, resize: int | None) -> dict[str, str | None]:
    """What transformers' configuration of the processor says; what it leaves out is as in MobileNetV2's."""
    kind = processor.word("image_processor_type", processor.word("feature_extractor_type", "MobileNetV2"))
    if not kind.startswith("MobileNetV2"):
        return {"preprocessing": None, "wants": f"what transformers' {kind} does"}
    resample = processor.get("resample", _FILTERS.index("bilinear"))
    if not isinstance(resample, int) or not _within(resample, 0, len(_FILTERS) - 1):
        processor.refuse("resample", f"PIL's number of a filter, 0 to {len(_FILTERS) - 1}")
    scale = processor.number("rescale_factor", 1 / 255, 1e-6, 1e3) if processor.flag("do_rescale", True) else 1.0
    mean, std = processor.colours("image_mean", (0.5,) * 3, -1e4), processor.colours("image_std", (0.5,) * 3, 1e-6)
    if not processor.flag("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    size = processor.sides("size", {"shortest_edge": 256})
    crop = processor.sides("crop_size", {"height": 224, "width": 224})
    resized: int | str = size["shortest_edge"] if [*size] == ["shortest_edge"] else _in_words(size)
    square = crop.keys() == {"height", "width"} and crop["height"] == crop["width"]
    cropped: int | str = crop["height"] if square else f"centre of {_in_words(crop)}"
    if not processor.flag("do_center_crop", True):
        cropped = "not cropped"
    if processor.flag("do_pad", False):
        cropped = "cropped and padded"
    return _Evaluation(
        tuple(each / scale for each in mean),
        tuple(each / scale for each in std),
        _FILTERS[resample],
        resized if processor.flag("do_resize", True) else "not resized",
        cropped,
    ).record(resize)


def _in_words(sides: Mapping[str, int]) -> str:
    return " and ".join(f"{name.replace('_', ' ')} {pixels}" for name, pixels in sides.items())


def _timm(config: _Object) -> dict[str, Any]:
    """What timm's configuration says beside the weights; the width isn't taken from the architecture's name."""
    if not re.fullmatch(r"mobilenetv2_[0-9]{3}(\..+)?", config.word("architecture", "none")):
        config.refuse("architecture", "mobilenetv2_ and three digits")
    arguments = config.object("model_args")
    for name, value in arguments.content.items():
        if value is None or name in _TIMM_HARMLESS:
            continue
        if name not in _TIMM:
            shown = name[:50] if name.isprintable() else ascii(name[:50])
            raise InputError(f"{config.path}: expected none but MobileNetV2's own model_args, got {shown}")
        allowed = _TIMM[name]
        if allowed is not None and value not in allowed:
            arguments.refuse(name, " or ".join(repr(each) for each in allowed))
    record: dict[str, Any] = {}
    if arguments.get("pad_type") is not None:
        record["padding"] = arguments.get("pad_type") or "symmetric"
    if arguments.get("bn_eps") is not None:
        record["norm_eps"] = arguments.number("bn_eps", 1e-5, 1e-12, 0.5)
    pretrained = config.object("pretrained_cfg") if "pretrained_cfg" in config.content else config  # as timm once did
    own = next((each for each in (config, pretrained) if each.get("label_names")), None)
    classes = own.classes("label_names") if own else pretrained.classes("labels")
    return record | _timm_preprocessing(pretrained) | classes


def _timm_preprocessing(pretrained: _Object) -> dict[str, Any]:
    """What timm's configuration of pretrained weights says; what it leaves out is as timm takes it."""
    said = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    if all(pretrained.get(name) is None for name in said):
        return {}
    size = pretrained.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3 or not all(map(_pixels, size)):
        pretrained.refuse("input_size", "three channels, and pixels down and across")
    _, height, width = size
    usual_mean, usual_std = (tuple(each / 255 for each in values) for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    shorter = int(min(height, width) / pretrained.number("crop_pct", 0.875, 0.01, 100))
    mode = pretrained.word("crop_mode", "center")
    wanted = _Evaluation(
        tuple(255 * each for each in pretrained.colours("mean", usual_mean, -1e4)),
        tuple(255 * each for each in pretrained.colours("std", usual_std, 1e-6)),
        pretrained.word("interpolation", "bicubic"),
        shorter if mode == "center" else f"{mode} to {shorter}",
        height if height == width else f"centre {height} by {width}",
    )
    if height != width:
        return wanted.record(None)
    return {"resize": height} | wanted.record(height)
