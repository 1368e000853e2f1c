"""What a trained network sees in pictures.

    python -m mnv2.predict FILE... --pretrained WEIGHTS [--topk 5] [--json] [--save DIR]

A FILE is a picture, a folder with pictures in it or below it, or `-` for one picture from stdin. The pictures are
prepared as validate.py prepares them, and go through the folded network. Each gives its path, its likeliest classes,
and the best one as a dictionary of number and name; with `--json`, one object a line. stderr says which weights these
are and what was assumed of them. What can't be decoded is named there too, the others are predicted, and the exit
status is 1. `--help` lists the flags.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .caption import require_pillow, save_captioned
from .config import TrainedConfig, check_backend
from .data import BadFileError
from .distributed import World, world
from .errors import InputError, exit_status
from .files import Picture, Problem, find_pictures
from .flags import option, parse
from .inference import InferenceNetwork
from .inputs import files_loader
from .labels import class_names
from .precision import autocast, numerics
from .serving import learnt, ready
from .weights import Weights


@dataclass(frozen=True)
class PredictConfig(TrainedConfig):
    """What is predicted, and how it is told."""

    files: tuple[str, ...] = option(
        (), "pictures, folders of pictures, or - for one from stdin", positional=True, metavar="FILE"
    )
    topk: int = option(5, "classes that are told of each picture")
    json: bool = option(False, "print one JSON object a line", action="store_true")
    save: str | None = option(None, "write each picture with its label drawn on it there", metavar="DIR")

    def __post_init__(self) -> None:
        """Check every value that doesn't need the pictures to be looked at."""
        super().__post_init__()
        if self.topk < 1:
            raise InputError(f"--topk: expected a positive integer, got {self.topk}")


class Answer(NamedTuple):
    """The likeliest classes of a picture, best first: number, name and probability of each."""

    picture: Picture
    classes: list[tuple[int, str, float]]

    @property
    def best(self) -> dict[int, str]:
        """Number and name of the likeliest class."""
        number, name, _ = self.classes[0]
        return {number: name}

    def text(self) -> str:
        """Lines for a reader."""
        width = max(len(name) for _, name, _ in self.classes)
        lines = [f"  {rank}. {name:{width}}  {share:.4f}" for rank, (_, name, share) in enumerate(self.classes, 1)]
        return "\n".join([self.picture.name, *lines, str(self.best)])

    def json(self) -> str:
        """One line for a program."""
        classes = [{"class": number, "name": name, "probability": share} for number, name, share in self.classes]
        return json.dumps({"path": self.picture.name, "classes": classes})


@torch.inference_mode()
def logits(
    config: PredictConfig, here: World, network: InferenceNetwork, pictures: Sequence[Picture]
) -> Iterator[tuple[Picture, Tensor] | Problem]:
    """Each picture's logits ``[classes]`` in fp32, in order, or why there are none."""
    rest = list(pictures)
    while rest:
        batches = replace(config, batch_size=min(config.batch_size, len(rest)))
        done = 0
        try:
            for batch in files_loader(batches, here, [picture.path for picture in rest], [0] * len(rest)):
                with autocast(config.precision, here.device):
                    rows = network(batch.images).float().cpu()
                for row in rows[batch.numbers >= 0]:
                    yield rest[done], row
                    done += 1
            return
        except BadFileError as bad:  # the loader is lost with it: go on with another
            rest = rest[done:]
            yield from (Problem(picture.name, bad.problem) for picture in rest if picture.path == bad.path)
            rest = [picture for picture in rest if picture.path != bad.path]


def answers(
    config: PredictConfig, here: World, weights: Weights, pictures: Sequence[Picture]
) -> Iterator[Answer | Problem]:
    """What ``weights`` say to each of ``pictures``, in order."""
    network = ready(config, here, weights, min(config.batch_size, len(pictures)))
    names = class_names(weights.num_classes, weights.classes)
    for found in logits(config, here, network, pictures):
        if isinstance(found, Problem):
            yield found
            continue
        picture, row = found
        if not row.isfinite().all():
            yield Problem(picture.name, "makes the network give numbers that aren't finite")
            continue
        shares = row.softmax(0).tolist()
        # Of equal logits the lower class comes first, as in an evaluation.
        best = row.argsort(descending=True, stable=True)[: config.topk].tolist()
        yield Answer(picture, [(number, names[number], shares[number]) for number in best])


def predict(config: PredictConfig, here: World) -> Iterator[Answer | Problem]:
    """What is in the pictures of ``config``, and what failed."""
    say = partial(print, file=sys.stderr)  # stdout has the answers alone
    config, weights = learnt(config, here, say)
    if config.save is not None:
        require_pillow("--save")
        os.makedirs(config.save, exist_ok=True)
    say(f"weights: {weights.about()}")
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for found in find_pictures(config.files, folder):
            if isinstance(found, Picture):
                pictures.append(found)
            else:
                yield found
        for answer in answers(config, here, weights, pictures) if pictures else ():
            yield answer
            if config.save is not None and isinstance(answer, Answer):
                yield from _save(answer, config.save)


def _save(answer: Answer, folder: str) -> Iterator[Problem]:
    _, name, share = answer.classes[0]
    try:
        save_captioned(answer.picture.path, f"{name} {share:.1%}", folder)
    except (OSError, ValueError) as error:
        yield Problem(answer.picture.name, f"can't be saved with its label: {error}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(PredictConfig, argv, "What a trained network sees in pictures.", program="mnv2.predict")
    failures = 0

    def action() -> None:
        nonlocal failures
        with numerics(config.deterministic), world(config.device) as here:
            check_backend(config.backend, here.device)
            for found in predict(config, here):
                if isinstance(found, Problem):
                    failures += 1
                    sys.stderr.write(f"mnv2.predict: {found.name} {found.problem}\n")
                else:
                    print(found.json() if config.json else found.text(), flush=True)

    return exit_status("mnv2.predict", action) or int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
