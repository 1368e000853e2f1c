"""Several variants evaluated on the same pictures: which ones, and a table beside the published accuracies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Evaluation
from .errors import InputError
from .model import VARIANTS
from .registry import PUBLISHED, by_digest
from .weights import Weights

_OWN = "this file"  # what its publisher says of the very file
_ORIGINS = ("Google", "MindSpore", "d-li14", _OWN)


@dataclass(frozen=True)
class Row:
    """What came of one variant: its weights and their evaluation, None where there are no weights."""

    alpha: float
    resize: int
    weights: Weights | None = None
    result: Evaluation | None = None

    @property
    def name(self) -> str:
        """The variant as its publishers call it."""
        return f"{self.alpha}_{self.resize}"


def variants(words: Sequence[str]) -> list[tuple[float, int]]:
    """Width and resolution of each variant that ``words`` name, such as 0.75_192; of all that are published for none.

    Raises:
        InputError: a word is no such name.
    """
    if not words:
        return [(alpha, resize) for alpha, sizes in VARIANTS.items() for resize in sizes]
    found = []
    for word in ",".join(words).split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)_(\d+)", word)
        if match is None:
            raise InputError(f"--sweep: expected variants such as 0.75_192, got {word}")
        found.append((float(match[1]), int(match[2])))
    return found


def table(rows: Sequence[Row]) -> str:
    """A line a variant: top-1 and top-5 in percent, what was published of it, and what follows from both."""
    lines: list[tuple[str, ...]] = [("variant", "top-1", "top-5", "pictures", *_ORIGINS, "weights")]
    for row in rows:
        published = dict(PUBLISHED.get((row.alpha, row.resize), {}))
        source = by_digest(row.weights.sha256) if row.weights and row.weights.sha256 else None
        if source is not None:
            published[_OWN] = source.accuracy
        known = [f"{published[origin].top1:.1f}" if origin in published else "" for origin in _ORIGINS]
        found = ["", "", ""]
        if row.result is not None:
            shares = [f"{100 * right / row.result.pictures:.2f}" for right in (row.result.top1, row.result.top5)]
            found = [*shares, str(row.result.pictures)]
        where = f"{row.weights.source}, {row.weights}" if row.weights else "none"
        lines.append((row.name, *found, *known, where))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
