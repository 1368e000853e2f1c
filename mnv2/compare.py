"""Compare two evaluations of the same pictures: ``python -m mnv2.compare A B [--list]``.

A and B are files of ``validate.py --results``. Printed are the accuracy of each, how many pictures each alone has
right, and what tells a difference from chance: McNemar's exact test, which looks at those pictures alone, and an
interval for the difference of the accuracies. Pictures may come in any order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .engine import wilson_interval
from .errors import InputError, exit_status
from .flags import option, parse
from .predictions import FIRST, Prediction, read

Pair = tuple[Prediction, Prediction]


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""

    a: str = option(None, "results of one evaluation", positional=True, metavar="A")
    b: str = option(None, "results of the other", positional=True, metavar="B")
    list: bool = option(False, "name the pictures that one alone has right", action="store_true")


@dataclass(frozen=True)
class Outcomes:
    """How many pictures both have right, A alone, B alone, and neither."""

    both: int
    a_alone: int
    b_alone: int
    neither: int

    @property
    def pictures(self) -> int:
        """All of them."""
        return self.both + self.a_alone + self.b_alone + self.neither


class Change(NamedTuple):
    """By how much the probability of class ``label`` differs for ``picture``.

    ``at_least`` where one of the two doesn't list the class, whose probability there is at most that of the last one
    listed.
    """

    size: float
    picture: str
    label: int
    at_least: bool


def mcnemar(b: int, c: int) -> float:
    """Two-sided p of McNemar's exact test, where ``b`` and ``c`` pictures are right in one of two evaluations alone.

    Twice the lower tail of the binomial distribution of b + c throws of a coin, at most 1.
    """
    n, k = b + c, min(b, c)
    # The largest term by logarithms, the others as ratios to it: no count is too large.
    largest = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    ratio = tail = 1.0
    while k > 0 and ratio > 1e-18 * tail:
        ratio *= k / (n - k + 1)
        tail += ratio
        k -= 1
    return min(1.0, 2 * math.exp(largest) * tail)


def paired_interval(outcomes: Outcomes, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval for the accuracy of B less that of A, on the same pictures.

    Method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17: Wilson's intervals of the two, put together by their correlation phi, which
    is corrected for continuity where it is positive.
    """
    n = outcomes.pictures
    right_a, right_b = outcomes.both + outcomes.a_alone, outcomes.both + outcomes.b_alone
    covariance = outcomes.both * outcomes.neither - outcomes.a_alone * outcomes.b_alone
    corrected = max(covariance - n / 2, 0.0) if covariance > 0 else float(covariance)
    product = right_a * (n - right_a) * right_b * (n - right_b)
    phi = corrected / math.sqrt(product) if product else 0.0
    a, b = right_a / n, right_b / n
    low_a, high_a = wilson_interval(right_a, n, confidence)
    low_b, high_b = wilson_interval(right_b, n, confidence)
    return b - a - _joined(b - low_b, high_a - a, phi), b - a + _joined(high_b - b, a - low_a, phi)


def _joined(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def match(a: Mapping[str, Prediction], b: Mapping[str, Prediction], names: Sequence[str]) -> dict[str, Pair]:
    """The two predictions of each picture, in the order of ``a``; ``names`` are what errors call the files.

    Raises:
        InputError: they are not of the same pictures and labels.
    """
    for mine, other, (name, elsewhere) in ((a, b, names), (b, a, names[::-1])):
        missing = [picture for picture in mine if picture not in other]
        if missing:
            raise InputError(
                f"expected the same pictures in both, but {missing[0]} is in {name} and not in {elsewhere} "
                f"({len(missing)} such pictures)"
            )
    pairs = {picture: (prediction, b[picture]) for picture, prediction in a.items()}
    for picture, (one, two) in pairs.items():
        if one.label != two.label:
            raise InputError(
                f"expected the same labels in both, but {picture} has {one.label} in {names[0]} and {two.label} in "
                f"{names[1]}"
            )
    return pairs


def count(pairs: Mapping[str, Pair]) -> Outcomes:
    """Who is right how often."""
    rights = [(one.right, two.right) for one, two in pairs.values()]
    cells = [(True, True), (True, False), (False, True), (False, False)]
    return Outcomes(*(rights.count(cell) for cell in cells))


def largest_change(pairs: Mapping[str, Pair]) -> Change:
    """The largest change of the probability of a class that is listed for a picture, the first of equal ones."""
    changes = (change for picture, (one, two) in pairs.items() for change in _changes(picture, one, two))
    return max(changes, key=lambda change: change.size)


def _changes(picture: str, one: Prediction, two: Prediction) -> Iterator[Change]:
    here = dict(zip(one.classes, one.probabilities, strict=True))
    there = dict(zip(two.classes, two.probabilities, strict=True))
    for label in [*here, *(label for label in there if label not in here)]:
        if label in here and label in there:
            yield Change(abs(here[label] - there[label]), picture, label, False)
        else:
            listed, last = (here, two.probabilities[-1]) if label in here else (there, one.probabilities[-1])
            yield Change(max(0.0, listed[label] - last), picture, label, True)


def lines(pairs: Mapping[str, Pair], names: Sequence[str]) -> list[str]:
    """What is printed of two evaluations, whose files are called ``names``."""
    outcomes, total = count(pairs), len(pairs)
    low, high = paired_interval(outcomes)
    p = mcnemar(outcomes.a_alone, outcomes.b_alone)
    change = largest_change(pairs)
    differ = sum(one.classes[0] != two.classes[0] for one, two in pairs.values())
    found = [f"{total} pictures"]
    for letter, name, predictions in zip("AB", names, zip(*pairs.values(), strict=True), strict=True):
        found += [f"{letter}: {name}", *(f"   {words}" for words in _accuracies(predictions))]
    found += [
        f"both right {outcomes.both}, A alone {outcomes.a_alone}, B alone {outcomes.b_alone}, "
        f"neither {outcomes.neither}; predictions differ for {differ}",
        f"B - A: {100 * (outcomes.b_alone - outcomes.a_alone) / total:+.2f} points of top-1, 95% interval "
        f"{100 * low:+.2f} to {100 * high:+.2f} (Newcombe 1998, method 10)",
        f"McNemar's exact test, two-sided: p {f'= {p:.3g}' if p > 1e-300 else '< 1e-300'}",
        f"largest change of a probability: {'at least ' if change.at_least else ''}{change.size:.3g}, "
        f"of class {change.label} for {change.picture}",
    ]
    return found


def _accuracies(predictions: Sequence[Prediction]) -> Iterator[str]:
    total = len(predictions)
    for name, first in (("top-1", 1), (f"top-{FIRST}", FIRST)):
        right = sum(prediction.label in prediction.classes[:first] for prediction in predictions)
        low, high = wilson_interval(right, total)
        yield f"{name}: {right} right, {right / total:.2%}, 95% interval {low:.2%} to {high:.2%}"


def flips(pairs: Mapping[str, Pair]) -> Iterator[str]:
    """A line for each picture that one alone has right: who, the picture, its class, what A and B put first."""
    for picture, (one, two) in pairs.items():
        if one.right != two.right:
            yield (
                f"{'A' if one.right else 'B'} alone: {picture}, class {one.label}, "
                f"A says {one.classes[0]} ({one.probabilities[0]:.3f}), B {two.classes[0]} ({two.probabilities[0]:.3f})"
            )


def compare(config: CompareConfig) -> None:
    """Print the comparison."""
    names = (config.a, config.b)
    pairs = match(read(config.a), read(config.b), names)
    print("\n".join([*lines(pairs, names), *(flips(pairs) if config.list else ())]), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(CompareConfig, argv, "Compare two evaluations of the same pictures.", program="mnv2.compare")
    return exit_status("mnv2.compare", lambda: compare(config))


if __name__ == "__main__":
    sys.exit(main())
