"""What the loader's pictures and PIL's differ in, step by step, and what that does to predictions.

    python -m mnv2.audit --data_url DIR [--pretrained WEIGHTS] [--preprocessing PROFILE|all] [--json FILE]

DIR is what validate.py takes, or any folder of pictures. Each picture is prepared by the loader's own pipeline and as
torchvision and PIL do it: decoded, resized and cropped, normalised, and end to end. Printed are the differences of each
step on the same input, in 8-bit levels; with weights also the predictions that flip, and the accuracy of each side, of
each step and of every profile. What can't be decoded is named on stderr, and the exit status is 1. `--help` lists the
flags.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import audit_report, pil_pictures
from .atomic import check_place
from .audit_result import ALL, Audit
from .audit_steps import Made, Opened, Steps
from .caption import require_pillow
from .config import DEFAULT_DATA, PREPROCESSING, TrainedConfig, check_backend
from .data import Profile, failure, first_undecodable, profile
from .distributed import World, world
from .errors import InputError, RunError, exit_status
from .files import Problem, class_folders, find_pictures, passed_over_words, pictures_below
from .flags import option, parse, parse_pretrained
from .labels import class_index, class_names, read_labels
from .logs import versions, with_progress
from .precision import autocast, input_dtype, numerics
from .pretrained import find, follow
from .serving import ready
from .weights import Weights

EVERY = "all"
_SIDES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "pillow")


@dataclass(frozen=True)
class AuditConfig(TrainedConfig):
    """What is compared, on which pictures."""

    data_url: str = option(DEFAULT_DATA, "folder that holds val/, or any folder of pictures or of class folders")
    pretrained: bool | str = option(
        False, "weights whose predictions are compared, as validate.py takes them", parse=parse_pretrained, const=True
    )
    preprocessing: str | None = option(
        None,
        "the profile that is compared, or all; None for the weights' own, without weights reference",
        choices=(*PREPROCESSING, EVERY),
    )
    pictures: int = option(1000, "pictures at most, evenly spread over the folder; 0 for all")
    class_index: str = option(
        "auto", "a class's number: auto, folders (sorted), imagenet, or a FILE of one class a line", metavar="RULE"
    )
    val_labels: str | None = option(None, "file of names and classes, where folders don't tell", metavar="FILE")
    batch_size: int = option(16, "pictures in memory at once, and of a forward pass")
    json: str | None = option(None, "write everything that was found there, all flips too", metavar="FILE")

    def __post_init__(self) -> None:
        """Check every value that doesn't need the pictures to be looked at."""
        super().__post_init__()
        if self.pictures < 0:
            raise InputError(f"--pictures: expected a number from 0 up, got {self.pictures}")


@dataclass(frozen=True)
class Listing:
    """The pictures of ``folder`` to compare, ``paths``, and the ``names`` of their classes, empty where it isn't known.

    ``classes`` are the sorted names of all that lie there, ``words`` say how many do.
    """

    folder: str
    paths: list[str]
    names: list[str]
    classes: list[str]
    words: str


def list_pictures(config: AuditConfig) -> Listing:
    """The pictures in val/ of ``config.data_url``, or in the folder itself, as many as are asked for.

    Raises:
        InputError: there are none.
    """
    folder = os.path.join(config.data_url, "val")
    if not os.path.isdir(folder):
        folder = config.data_url
    if not os.path.isdir(folder):
        raise InputError(f"--data_url: expected a folder of pictures, got {folder}, which is none")
    passed_over: Counter[str] = Counter()
    found = pictures_below(folder, passed_over)
    if not found:
        raise InputError(f"--data_url: expected pictures in {folder}, got none{passed_over_words(passed_over)}")
    if config.val_labels is not None:
        told = read_labels(config.val_labels, [os.path.basename(path) for path in found])
        names = [told.get(os.path.basename(path), "") for path in found]
    else:
        names = [_class_folder(os.path.relpath(path, folder)) for path in found]
    count = min(config.pictures or len(found), len(found))
    chosen = [number * len(found) // count for number in range(count)]
    return Listing(
        folder,
        [found[number] for number in chosen],
        [names[number] for number in chosen],
        sorted({*names} - {""}),
        f"{count} of {len(found)} pictures{passed_over_words(passed_over)}",
    )


def _class_folder(path: str) -> str:
    return path.split(os.sep)[0] if os.sep in path else ""


def number_classes(config: AuditConfig, listing: Listing, weights: Weights) -> tuple[list[int], str]:
    """The class of each picture by the network's numbers, -1 where it isn't known, and where that is from.

    Raises:
        InputError: ``config`` says how classes are numbered, and that doesn't fit.
    """
    outputs = weights.num_classes
    try:
        if not listing.classes:
            raise InputError(f"--data_url: expected class folders in {listing.folder}, got none")
        folders = class_folders(config.data_url, "train")
        index = class_index(
            config.class_index, listing.classes, trained=weights.classes, folders=folders, outputs=outputs
        )
        if len(index) > outputs or (index.guessed and len(index) != outputs):
            raise InputError(f"--class_index: expected {outputs} classes as the weights have, got {len(index)}")
    except InputError as error:
        if config.class_index != "auto" or config.val_labels is not None:
            raise
        return [-1] * len(listing.paths), f"no accuracy ({error})"
    return [index.numbers[name] if name else -1 for name in listing.names], f"class numbers: {index.source}"


class Network:
    """The folded network of ``weights``, as an evaluation runs it."""

    def __init__(self, config: AuditConfig, here: World, weights: Weights):
        self._folded = ready(config, here, weights, config.batch_size)
        self._precision, self._device = config.precision, here.device

    @torch.inference_mode()
    def __call__(self, inputs: NDArray[Any]) -> Tensor:
        """Logits ``[B, classes]`` in fp32 of inputs ``[B, R, R, 3]``."""
        images = torch.from_numpy(inputs).to(self._device).permute(0, 3, 1, 2)
        with autocast(self._precision, self._device):
            logits: Tensor = self._folded(images).float().cpu()
        return logits


class Auditor:
    """Takes batches of pictures into ``result``.

    Args:
        config: what is compared.
        here: the device.
        listing: the pictures.
        network: what predicts, where there are weights.
        labels: the class of each picture, -1 where it isn't known.
    """

    def __init__(self, config: AuditConfig, here: World, listing: Listing, network: Network | None, labels: list[int]):
        assert config.preprocessing is not None, "pretrained.follow decides"
        self.result = Audit(_profiles(config.resize), config.preprocessing)
        self._network, self._folder, self._threads = network, listing.folder, config.threads
        self._labels = dict(zip(listing.paths, labels, strict=True))
        self._steps = Steps(
            list(self.result.compared),
            [transform for transform in self.result.profiles if network and transform not in self.result.compared],
            device=here.device,
            dtype=input_dtype(config.precision),
            batch_size=min(config.batch_size, len(listing.paths)),
            threads=config.threads,
        )

    def compare(self, paths: Sequence[str]) -> None:
        """Compare what both can decode of ``paths``, and report the others.

        Raises:
            RunError: DALI fails, and at no single file.
        """
        opened = [*self._opened(paths)]
        while opened:
            try:
                made = self._steps.run(opened)
            except RuntimeError as error:
                bad = first_undecodable([one.path for one in opened], self._threads)
                if bad is None:
                    raise RunError(f"DALI failed at no single file: {failure(error)}") from error
                self._report(bad, "can be decoded by PIL and not by DALI")
                opened = [one for one in opened if one.path != bad]
            else:
                self._take_in(opened, made)
                return

    def _opened(self, paths: Sequence[str]) -> Iterator[Opened]:
        for found in find_pictures(paths, ""):
            if isinstance(found, Problem):
                self._report(*found)
                continue
            try:
                with open(found.path, "rb") as file:
                    content = file.read()
                kind, rgb = pil_pictures.kind(found.path), pil_pictures.opened(found.path)
            except Exception as error:  # a picture that is none of PIL's can fail anywhere in its reader
                self._report(found.path, f"can't be decoded by PIL: {failure(error)}")
                continue
            yield Opened(os.path.relpath(found.path, self._folder), found.path, content, kind, rgb)

    def _report(self, path: str, problem: str) -> None:
        self.result.problems.append((path, problem))
        tqdm.write(f"mnv2.audit: {path} {problem}", file=sys.stderr)  # above the bar

    def _take_in(self, opened: list[Opened], made: Made) -> None:
        names = [one.name for one in opened]
        labels = torch.tensor([self._labels[one.path] for one in opened])
        self.result.pictures += len(opened)
        self.result.labelled += int((labels >= 0).sum())
        for one, pixels in zip(opened, made.pixels, strict=True):
            self.result.add_decoded(one.name, one.kind, one.pixels, pixels)
        for transform, batch in made.batches.items():
            compared = self.result.compared[transform]
            compared.resized += sum(min(one.rgb.size) != transform.shorter for one in opened)
            compared.add_pixels(names, batch)
        if self._network is not None:
            self._judge(self._network, names, labels, made)

    def _judge(self, network: Network, names: list[str], labels: Tensor, made: Made) -> None:
        known: list[tuple[NDArray[Any], Tensor]] = []

        def logits(inputs: NDArray[Any]) -> Tensor:
            """Equal inputs, which there are where a step changes nothing, go through the network once."""
            for before, rows in known:
                if np.array_equal(before, inputs):
                    return rows
            known.append((inputs, network(inputs)))
            return known[-1][1]

        for transform, batch in made.batches.items():
            rows = {step: logits(inputs) for step, inputs in batch.inputs.items()}
            self.result.compared[transform].judge(names, labels, rows)
            self.result.scores[transform].add(rows[ALL], labels)
        for transform, inputs in made.others.items():
            self.result.scores[transform].add(logits(inputs), labels)


def _profiles(resize: int) -> dict[Profile, list[str]]:
    """Profiles and their names; those that coincide at ``resize`` pixels are one."""
    names: dict[Profile, list[str]] = {}
    for name in PREPROCESSING:
        names.setdefault(profile(name, resize), []).append(name)
    return names


def audit(config: AuditConfig, here: World) -> Audit:
    """Compare as ``config`` says, and print what was found; what can't be decoded is named on stderr.

    Raises:
        InputError: there is nothing to compare, or something that it takes is missing.
    """
    if here.size > 1:
        raise InputError(f"expected one process, got {here.size}")
    require_pillow("the comparison with PIL")
    if config.json is not None:
        check_place("--json", config.json)
    listing = list_pictures(config)
    weights = find(config, here)
    config = follow(config, weights, None if config.preprocessing == EVERY else here.print)
    if config.json is not None and weights is not None:
        weights.check_apart("--json", config.json)
    network, labels = None, [-1] * len(listing.paths)
    here.print(f"{listing.folder}: {listing.words}\n{_sides()}")
    if weights is not None:
        labels, words = number_classes(config, listing, weights)
        network = Network(config, here, weights)
        here.print(
            f"{words}\nalpha {config.alpha}, {config.precision}, {weights.num_classes} classes, {weights.about()}"
        )
    auditor = Auditor(config, here, listing, network, labels)
    starts = range(0, len(listing.paths), config.batch_size)
    for start in with_progress(starts, len(starts), "comparing", here):
        auditor.compare(listing.paths[start : start + config.batch_size])
    result = auditor.result
    if not result.pictures:
        raise InputError(f"--data_url: expected a picture in {listing.folder} that both can decode, got none")
    classes = class_names(weights.num_classes, weights.classes) if weights else None
    here.print(audit_report.text(result, classes))
    if config.json is not None:
        about = {"folder": listing.folder, "weights": str(weights) if weights else None, "config": asdict(config)}
        audit_report.write(config.json, about, result, classes)
    return result


def _sides() -> str:
    """Who is compared, in which version."""
    found = ", ".join(f"{name} {version}" for name, version in versions("pillow").items() if name in _SIDES)
    return f"{found}; PIL decodes JPEGs with {pil_pictures.jpeg_library()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(
        AuditConfig,
        argv,
        "What the loader's pictures and PIL's differ in, and which predictions flip.",
        program="mnv2.audit",
    )
    problems = 0

    def action() -> None:
        nonlocal problems
        with numerics(config.deterministic), world(config.device) as here:
            check_backend(config.backend, here.device)
            problems = len(audit(config, here).problems)

    return exit_status("mnv2.audit", action) or int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
