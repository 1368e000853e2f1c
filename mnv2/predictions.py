"""What a network says of each picture, as tensors and as the file of ``validate.py --results``.

The file is CSV in UTF-8 with the heading ``path,label,top1,...,p1,...``: the picture's path below the split's folder,
the number of its class, the numbers of the classes that the network puts first, and their probabilities. ImageNet's
classes have ImageNet's numbers, whether or not the network has a background before them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .atomic import replacing
from .errors import InputError, RunError
from .labels import BACKGROUND_FIRST, imagenet_orders

FIRST = 5  # classes that are kept of each picture


@dataclass(frozen=True)
class Predictions:
    """Of picture i its class ``labels[i]`` and the K classes put first, ``classes [N, K]``, the first in column 0.

    ``probabilities [N, K]`` are theirs.
    """

    labels: Tensor
    classes: Tensor
    probabilities: Tensor

    def by_class(self) -> list[tuple[int, int, int]]:
        """Class, its pictures and how many of them are right at first, of each class with pictures; worst first.

        Of classes that are equally bad the lower number comes first.
        """
        right = self.labels[self.classes[:, 0] == self.labels]
        pictures = self.labels.bincount().tolist()
        rights = right.bincount(minlength=len(pictures)).tolist()
        rows = [(label, count, rights[label]) for label, count in enumerate(pictures) if count]
        return sorted(rows, key=lambda row: (row[2] / row[1], row[0]))


def by_imagenets_numbers(predictions: Predictions, classes: Sequence[str]) -> Predictions:
    """``predictions`` with ImageNet-1k's numbers, where the ``classes`` by number are these behind a background.

    So runs of networks with and without that class, which becomes 1000, can be compared.
    """
    if list(classes) != imagenet_orders()[BACKGROUND_FIRST]:
        return predictions
    numbers = torch.tensor([len(classes) - 1, *range(len(classes) - 1)])
    return replace(predictions, labels=numbers[predictions.labels], classes=numbers[predictions.classes])


class Prediction(NamedTuple):
    """A row of the file."""

    label: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def right(self) -> bool:
        """Whether the picture's class comes first."""
        return self.classes[0] == self.label


def first_classes(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` classes with the largest of ``logits [B, C]`` (fp32), and their probabilities.

    Of equal logits the lower class comes first, as ``engine.ranks`` counts.
    """
    classes = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return classes, logits.softmax(1).gather(1, classes)


def write(path: str, pictures: Sequence[str], predictions: Predictions) -> None:
    """Write a row for each of ``pictures``, all of them or nothing.

    Raises:
        RunError: the file can't be written; what was there before still is.
    """
    columns = predictions.classes.shape[1]
    try:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_heading(columns))
            rows = zip(
                pictures,
                predictions.labels.tolist(),
                predictions.classes.tolist(),
                predictions.probabilities.tolist(),
                strict=True,
            )
            for picture, label, classes, probabilities in rows:
                # Nine digits tell any two numbers of fp32 apart.
                writer.writerow([picture, label, *classes, *(f"{p:.9g}" for p in probabilities)])
    except OSError as error:
        raise RunError(f"can't write {path}: {error}") from None


def read(path: str) -> dict[str, Prediction]:
    """The rows of a file by the pictures' paths.

    Raises:
        InputError: it can't be read, is no such file, or a picture comes twice.
    """
    found: dict[str, Prediction] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            heading = next(rows, [])
            columns = len(heading) // 2 - 1
            if not 1 <= columns <= FIRST or heading != _heading(columns):
                raise InputError(f"{path}: expected results of validate.py, which begin with path,label,top1")
            for row in rows:
                if len(row) != len(heading):
                    raise InputError(f"{path}: expected {len(heading)} columns in line {rows.line_num}, got {len(row)}")
                if row[0] in found:
                    raise InputError(f"{path}: expected each picture once, got {row[0]} again in line {rows.line_num}")
                found[row[0]] = _prediction(row, columns, f"{path}: line {rows.line_num}")
    except OSError as error:
        raise InputError(f"{path}: can't read it: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected CSV in UTF-8: {error}") from None
    if not found:
        raise InputError(f"{path}: expected pictures, got none")
    return found


def _heading(columns: int) -> list[str]:
    numbers = range(1, columns + 1)
    return ["path", "label", *(f"top{number}" for number in numbers), *(f"p{number}" for number in numbers)]


def _prediction(row: list[str], columns: int, place: str) -> Prediction:
    try:
        label, *classes = (int(word) for word in row[1 : 2 + columns])
        probabilities = tuple(float(word) for word in row[2 + columns :])
    except ValueError as error:
        raise InputError(f"{place}: expected numbers, but {error}") from None
    if not all(0 <= p <= 1 for p in probabilities):
        raise InputError(f"{place}: expected probabilities from 0 to 1, got {', '.join(row[2 + columns :])}")
    return Prediction(label, tuple(classes), probabilities)
