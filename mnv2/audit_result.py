"""What an audit has found: how far pixels differ, which predictions flip, and how many are right."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .data import Profile
from .engine import ranks
from .errors import RunError
from .predictions import first_classes

PIL = "PIL"  # every step done by PIL; under a step's name that step alone is DALI's, all of them end to end
DECODE, RESIZE, NORMALISE, ALL = STEPS = ("decode", "resize and crop", "normalise", "end to end")
_BINS = 2**15
_VALUES = 2**20  # of a picture at a time, which may be large
_OVER_ONE = 1.5  # levels are whole but for the rounding of normalised values, which this keeps out


class Difference:
    """How far pictures differ in two versions, over all that were added, in 8-bit levels.

    ``worst`` is the mean of the picture that differs most, and its name; None where none differs.
    """

    def __init__(self) -> None:
        self.values, self.total, self.largest = 0, 0.0, 0.0
        self.worst: tuple[float, str] | None = None
        self._histogram = np.zeros(_BINS, np.int64)

    def add(self, name: str, one: NDArray[Any], other: NDArray[Any], unit: Any = 1.0) -> None:
        """Take in a picture, of which a difference of 1 is ``unit`` 8-bit levels."""
        total, rows = 0.0, max(1, _VALUES // one[0].size)
        for start in range(0, len(one), rows):
            part = slice(start, start + rows)
            levels = np.abs(np.subtract(one[part], other[part], dtype=np.float32)) * np.asarray(unit, np.float32)
            total += float(levels.sum(dtype=np.float64))
            self.largest = max(self.largest, float(levels.max()))
            # By the upper half of a number's bits: exact for whole levels, to one part in 128 for others.
            self._histogram += np.bincount(levels.ravel().view(np.uint32) >> 16, minlength=_BINS)
        self.values += one.size
        self.total += total
        if total / one.size > (self.worst or (0.0, ""))[0]:
            self.worst = total / one.size, name

    @property
    def mean(self) -> float:
        """Over all values of all pictures."""
        return self.total / max(1, self.values)

    @property
    def over_one(self) -> float:
        """Share of the values that differ by more than one level."""
        return float(self._histogram[_bin(_OVER_ONE) :].sum()) / max(1, self.values)

    def quantile(self, share: float) -> float:
        """What ``share`` of all values differ by at most."""
        place = int(np.searchsorted(self._histogram.cumsum(), share * self.values))
        return float(np.uint32(min(place, _BINS - 1) << 16).view(np.float32))


def _bin(level: float) -> int:
    return int(np.float32(level).view(np.uint32)) >> 16


@dataclass(frozen=True)
class Flip:
    """A picture that is of class ``pil`` as PIL prepares it, and of another, ``dali``, with a step done by DALI.

    A side's margin is by how much the logit of its own class exceeds there that of the other side's. ``label`` is None
    where the picture's class isn't known.
    """

    picture: str
    label: int | None
    pil: int
    dali: int
    pil_margin: float
    dali_margin: float


@dataclass
class Score:
    """How many pictures of known class are right at first, and among the first five."""

    top1: int = 0
    top5: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count ``logits [B, C]``, of which those with label -1 are of unknown class."""
        known = labels >= 0
        rank = ranks(logits[known], labels[known])
        self.top1 += int((rank < 1).sum())
        self.top5 += int((rank < 5).sum())


class Batch(NamedTuple):
    """A batch's pixels on the way through a profile.

    ``crops`` and ``dali_crops`` are PIL's and DALI's ``[R, R, 3]`` uint8 of each picture in PIL's pixels. ``inputs``
    are the network's, ``[B, R, R, 3]``: PIL's under ``PIL``, and under a step those with that step done by DALI.
    """

    crops: list[NDArray[Any]]
    dali_crops: list[NDArray[Any]]
    inputs: dict[str, NDArray[Any]]


@dataclass
class Compared:
    """A profile both ways: differences, scores and flips by step. ``resized`` pictures had another short side."""

    names: list[str]
    transform: Profile
    differences: dict[str, Difference]
    scores: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    flips: dict[str, list[Flip]] = field(default_factory=lambda: defaultdict(list))
    resized: int = 0

    def add_pixels(self, names: list[str], batch: Batch) -> None:
        """Take in what is changed by DALI's resizing and normalising and by the whole."""
        for number, name in enumerate(names):
            self.differences[RESIZE].add(name, batch.crops[number], batch.dali_crops[number])
            for step in (NORMALISE, ALL):
                theirs, ours = batch.inputs[PIL][number], batch.inputs[step][number]
                self.differences[step].add(name, theirs, ours, self.transform.std)

    def judge(self, names: list[str], labels: Tensor, logits: dict[str, Tensor]) -> None:
        """Take in what the network says of a batch prepared by PIL and with each step done by DALI.

        Raises:
            RunError: a logit isn't finite.
        """
        base = logits[PIL]
        theirs = first_classes(base, 1)[0][:, 0]
        for step, rows in logits.items():
            if not rows.isfinite().all():
                raise RunError(f"the network gives numbers that aren't finite, for {names[0]} or one of the next")
            self.scores[step].add(rows, labels)
            ours = first_classes(rows, 1)[0][:, 0]
            for i in (ours != theirs).nonzero()[:, 0].tolist():
                label, pil, dali = int(labels[i]), int(theirs[i]), int(ours[i])
                margins = float(base[i, pil] - base[i, dali]), float(rows[i, dali] - rows[i, pil])
                self.flips[step].append(Flip(names[i], None if label < 0 else label, pil, dali, *margins))


@dataclass
class Kind:
    """What decoding makes of one kind of file; ``other_size`` pictures don't even have PIL's size."""

    difference: Difference = field(default_factory=Difference)
    pictures: int = 0
    other_size: int = 0


class Audit:
    """All that was found.

    Args:
        profiles: every profile and its names.
        preprocessing: the name of the one that is ``compared`` both ways, or "all".

    ``scores`` are DALI's of every profile, ``kinds`` what decoding makes of each kind of file, ``problems`` pairs of a
    path and what is wrong with it. ``labelled`` of the ``pictures`` are of known class.
    """

    def __init__(self, profiles: dict[Profile, list[str]], preprocessing: str):
        self.profiles = profiles
        self.decode = Difference()
        self.compared = {
            transform: Compared(
                names, transform, {DECODE: self.decode, **{step: Difference() for step in (RESIZE, NORMALISE, ALL)}}
            )
            for transform, names in profiles.items()
            if preprocessing in ("all", *names)
        }
        self.scores: dict[Profile, Score] = defaultdict(Score)
        self.kinds: dict[str, Kind] = defaultdict(Kind)
        self.pictures = self.labelled = 0
        self.problems: list[tuple[str, str]] = []

    def add_decoded(self, name: str, kind: str, theirs: NDArray[Any], ours: NDArray[Any]) -> None:
        """Take in what PIL and DALI decode the picture called ``name`` to."""
        found = self.kinds[kind]
        found.pictures += 1
        if theirs.shape != ours.shape:
            found.other_size += 1
            return
        for difference in (found.difference, self.decode):
            difference.add(name, theirs, ours)
