"""What an audit has found, as text and as JSON, and why it differs.

The causes below are no guesses: the tests make a picture of each kind, and arithmetic of their own that has the cause
or lacks it.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .atomic import replacing
from .audit_result import ALL, NORMALISE, PIL, RESIZE, STEPS, Audit, Compared, Difference, Flip, Kind
from .data import Profile
from .errors import RunError
from .logs import versions

SHOWN = 20  # flips that are printed of a profile; the JSON has all
_WIDTH = 120
_SHARE = 0.999
_HEADING = ("mean", f"{_SHARE:.1%}", "largest", "over 1")
# Words that a kind of file has, all of them, and what its decoders differ in; the first that fits counts.
_CAUSES = (
    (("with an orientation",), "PIL turns a TIFF by its orientation tag, DALI doesn't"),
    (("without Adobe's marker",), "DALI takes the inks for the inverse of what PIL takes them for"),
    (("I;16",), "PIL cuts 16-bit grey off at 255, DALI scales it to 8 bits"),
    (("I", "of 16 bits"), "PIL cuts 16-bit grey off at 255, DALI scales it to 8 bits"),
    (("of 16 bits",), "PIL takes the upper 8 of 16 bits, DALI rounds"),
    (("TIFF", "P"), "PIL takes the upper 8 of a palette's 16 bits, DALI rounds"),
    (("TIFF", "LA"), "DALI takes a grey TIFF's transparency for green"),
    (("TIFF", "YCbCr"), "the two round otherwise where they turn YCbCr into RGB"),
)


def text(audit: Audit, classes: Sequence[str] | None) -> str:
    """What is printed; ``classes`` are what the network's classes are called, None without a network."""
    lines = [f"{audit.pictures} pictures compared; differences are in 8-bit levels, over all values of all pixels"]
    for compared in audit.compared.values():
        lines += ["", f"{_called(compared)}: {_in_words(compared.transform)}; {compared.resized} pictures are resized"]
        lines += _table(_steps(audit, compared, judged=classes is not None))
        lines += _flips(compared, classes or ())
    lines += ["", "decoding, by kind of file", *_table(_kinds(audit))]
    lines += ["", "every profile, by DALI", *_table(_profiles(audit))]
    return "\n".join([*lines, "", textwrap.fill("What differs, and why. " + " ".join(why(audit)), _WIDTH)])


def _called(compared: Compared) -> str:
    return " and ".join(compared.names)


def _in_words(transform: Profile) -> str:
    return ", ".join(f"{word} {value}" for word, value in _described(transform).items())


def _described(transform: Profile) -> dict[str, str]:
    """What a profile does, by word."""
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (transform.mean, transform.std))
    return {
        "short side": str(transform.shorter),
        "centre": str(transform.resize),
        "filter": "bicubic" if transform.cubic else "bilinear",
        "mean": mean,
        "std": std,
    }


def _steps(audit: Audit, compared: Compared, judged: bool) -> Iterator[list[str]]:
    rated = judged and audit.labelled > 0
    heading = ["step by DALI", *_HEADING, "differs most"]
    yield heading[:-1] + ["flips"] * judged + ["top-1", "top-5"] * rated + heading[-1:]
    for step in (PIL, *STEPS) if rated else STEPS:
        found = compared.differences.get(step)
        row = [step, *_levels(found)] if found else ["none", "", "", "", ""]
        if judged:
            row.append(str(len(compared.flips[step])) if found else "")
        if rated:
            row += [f"{right} of {audit.labelled}" for right in vars(compared.scores[step]).values()]
        yield [*row, _worst(found) if found else ""]


def _levels(found: Difference) -> list[str]:
    return [f"{found.mean:.3g}", f"{found.quantile(_SHARE):.3g}", f"{found.largest:.3g}", f"{found.over_one:.3%}"]


def _worst(found: Difference) -> str:
    return f"{found.worst[1]} ({found.worst[0]:.3g})" if found.worst else ""


def _flips(compared: Compared, classes: Sequence[str]) -> Iterator[str]:
    """A line a flip, with all the steps that make it."""
    steps: dict[tuple[str, int], list[str]] = {}
    flips: dict[tuple[str, int], Flip] = {}
    for step in STEPS:
        for flip in compared.flips[step]:
            steps.setdefault((flip.picture, flip.dali), []).append(step)
            flips[flip.picture, flip.dali] = flip

    def called(number: int) -> str:
        return f"{number} {classes[number].partition(',')[0]}"  # ImageNet's names are lists: one will do

    for place in sorted(flips)[:SHOWN]:
        flip = flips[place]
        known = "" if flip.label is None else f", which is {called(flip.label)}"
        yield (
            f"{flip.picture}{known}: PIL says {called(flip.pil)}, DALI {called(flip.dali)}, by {flip.pil_margin:.3f} "
            f"and {flip.dali_margin:.3f} in logits ({', '.join(steps[place])})"
        )
    if len(flips) > SHOWN:
        yield f"and {len(flips) - SHOWN} more flips, which --json FILE writes"


def _kinds(audit: Audit) -> Iterator[list[str]]:
    yield ["kind", "pictures", "of another size", *_HEADING, "differs most"]
    for name, kind in _by_number(audit):
        found = kind.difference
        yield [name, str(kind.pictures), str(kind.other_size), *_levels(found), _worst(found)]


def _by_number(audit: Audit) -> list[tuple[str, Kind]]:
    return sorted(audit.kinds.items(), key=lambda item: (-item[1].pictures, item[0]))


def _profiles(audit: Audit) -> Iterator[list[str]]:
    rated = bool(audit.scores) and audit.labelled > 0
    for number, (transform, names) in enumerate(audit.profiles.items()):
        described = _described(transform)
        if number == 0:
            yield ["profile", *described, *(["top-1", "top-5"] if rated else [])]
        right = vars(audit.scores[transform]).values() if rated else ()
        cells = [f"{count} of {audit.labelled}, {count / audit.labelled:.2%}" for count in right]
        for name in names:
            yield [name, *described.values(), *cells]


def _table(rows: Iterator[list[str]]) -> list[str]:
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def why(audit: Audit) -> Iterator[str]:
    """Sentences: what was found, and its cause where that is known."""
    compared = audit.compared.values()
    yield _why_decoding(audit)
    yield from _why_resizing(compared)
    rounding = max(one.differences[NORMALISE].largest for one in compared)
    yield f"Normalising the same pixels differs by {rounding:.2g} levels at most: both round."
    if any(one.scores for one in compared):
        yield from _why_flips(audit)
    if audit.scores and audit.labelled:
        yield _why_profiles(audit)


def _why_decoding(audit: Audit) -> str:
    differing = [(name, kind) for name, kind in _by_number(audit) if kind.difference.largest or kind.other_size]
    if not differing:
        return f"Decoding gives the same pixels for each of the {audit.pictures} pictures."
    by_cause: dict[str, list[str]] = {}
    for name, kind in differing:
        most = f"by {kind.difference.largest:.3g}" if kind.difference.largest else "in size"
        by_cause.setdefault(cause(name), []).append(f"{name} {most}")
    causes = "; ".join(f"{_listed(kinds)} ({reason})" for reason, kinds in by_cause.items())
    return f"Decoding differs for some kinds of file, in levels at most: {causes}."


def cause(kind: str) -> str:
    """Why decoders differ in files of the kind called ``kind``."""
    words = f" {kind} "
    return next((why for marks, why in _CAUSES if all(f" {mark} " in words for mark in marks)), "of no known cause")


def _why_resizing(compared: Collection[Compared]) -> Iterator[str]:
    whole = [_called(one) for one in compared if not one.resized]
    if whole:
        yield f"No picture is resized with {_listed(whole)}, as each has that short side already."
    found = {_called(one): one.differences[RESIZE] for one in compared if one.differences[RESIZE].largest}
    if not found:
        return
    levels = [f"{name} by {one.mean:.2g} in the mean and {one.largest:g} at most" for name, one in found.items()]
    yield (
        f"Resizing the same pixels differs, in levels, with {_listed(levels)}: PIL filters along rows, rounds to 8 "
        "bits and then filters along columns, DALI rounds once, at the end."
    )
    if any(one.transform.cubic and one.differences[RESIZE].largest > 1 for one in compared):
        yield "With bicubic PIL also cuts off between the two what lies under 0 or over 255, hence more than 1."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _why_flips(audit: Audit) -> Iterator[str]:
    flips = {_called(one): one.flips[ALL] for one in audit.compared.values()}
    counts = [f"{len(some)} with {name}" for name, some in flips.items()]
    margins = [max(flip.pil_margin, flip.dali_margin) for some in flips.values() for flip in some]
    widest = f", none by a margin of more than {max(margins):.3f} in logits" if margins else ""
    yield f"Of {audit.pictures} predictions DALI's pictures flip {_listed(counts)}{widest}."


def _why_profiles(audit: Audit) -> str:
    right = {names[0]: audit.scores[transform].top1 for transform, names in audit.profiles.items()}
    best, worst = max(right, key=right.__getitem__), min(right, key=right.__getitem__)
    sides = [abs(one.scores[ALL].top1 - one.scores[PIL].top1) for one in audit.compared.values()]
    between, across = (100 * count / audit.labelled for count in (right[best] - right[worst], max(sides)))
    profiles = f"{worst} and {best} by {between:.2f}" if between else "any two by nothing"
    return f"From PIL to DALI top-1 changes by {across:.2f} points at most, between the profiles {profiles}."


def content(audit: Audit, classes: Sequence[str] | None) -> dict[str, Any]:
    """What is written as JSON."""
    return {
        "pictures": audit.pictures,
        "labelled": audit.labelled,
        "problems": [{"path": path, "problem": problem} for path, problem in audit.problems],
        "kinds": {
            name: {"pictures": kind.pictures, "other_size": kind.other_size, **_figures(kind.difference)}
            for name, kind in _by_number(audit)
        },
        "profiles": {
            name: {
                **asdict(transform),
                **({"right": vars(audit.scores[transform])} if audit.scores else {}),
                "steps": {step: _step(audit.compared[transform], step, classes) for step in (PIL, *STEPS)}
                if transform in audit.compared
                else None,
            }
            for transform, names in audit.profiles.items()
            for name in names
        },
        "why": " ".join(why(audit)),
    }


def _figures(found: Difference) -> dict[str, Any]:
    return {
        "mean_levels": found.mean,
        "p999_levels": found.quantile(_SHARE),
        "largest_levels": found.largest,
        "over_one_share": found.over_one,
        "worst": {"picture": found.worst[1], "mean_levels": found.worst[0]} if found.worst else None,
    }


def _step(compared: Compared, step: str, classes: Sequence[str] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {} if step == PIL else _figures(compared.differences[step])
    if classes is not None:
        figures["right"] = vars(compared.scores[step])
        figures["flips"] = [
            {**asdict(flip), "pil_name": classes[flip.pil], "dali_name": classes[flip.dali]}
            for flip in compared.flips[step]
        ]
    return figures


def write(path: str, about: Mapping[str, Any], audit: Audit, classes: Sequence[str] | None) -> None:
    """Write ``about`` and all that was found to ``path`` as JSON, all of it or nothing.

    Raises:
        RunError: the file can't be written; what was there before still is.
    """
    try:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({**about, "versions": versions("pillow"), **content(audit, classes)}, file, indent=1)
    except OSError as error:
        raise RunError(f"can't write {path}: {error}") from None
