"""Finding published weights: by variant, by a file's name or checksum; and a table of them all."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InputError
from .published import PUBLISHED, SOURCES, Accuracy, File, Source

__all__ = [
    "PUBLISHED",
    "SOURCES",
    "Accuracy",
    "File",
    "Source",
    "alternatives",
    "by_digest",
    "by_file_name",
    "listing",
    "sources",
]

_HEADING = ("variant", "origin", "top-1", "top-5", "MB", "sha256", "licence", "file")
_NUMBERS = ("top-1", "top-5", "MB")
_DIGITS = 64  # of a whole SHA-256


def sources(alpha: float, resize: int) -> list[Source]:
    """What is published for a variant, best first; nothing where it isn't published.

    What mnv2 can read comes before what must be converted, what needs no further package before what does, and what has
    a known checksum before what hasn't; among equals the more accurate by its publisher's word.
    """
    found = [source for source in SOURCES if (source.alpha, source.resize) == (alpha, resize)]
    return sorted(found, key=lambda source: (_reservations(source), -source.accuracy.top1))


def _reservations(source: Source) -> tuple[bool, ...]:
    return source.conversion is not None, source.package is not None, source.weights.sha256 is None


def alternatives(alpha: float, resize: int) -> list[Source]:
    """What each origin has of this width for mnv2 to read, at the resolution that is nearest: the nearest first.

    Weights of another resolution have the same shapes; trained with larger pictures, they lose some points.
    """
    found = sorted(
        (source for source in SOURCES if source.alpha == alpha and source.conversion is None),
        key=lambda source: (abs(source.resize - resize), *_reservations(source)),
    )
    nearest: dict[str, Source] = {}
    for source in found:
        nearest.setdefault(source.origin, source)
    return list(nearest.values())


def by_digest(sha256: str) -> Source | None:
    """The weights whose file has the checksum ``sha256``, all 64 hexadecimal digits; None where it's unknown."""
    if len(sha256) != _DIGITS:
        raise ValueError(f"sha256: expected {_DIGITS} hexadecimal digits, got {sha256!r}")
    known = ((source, source.weights.sha256) for source in SOURCES)
    return next((source for source, start in known if start is not None and sha256.lower().startswith(start)), None)


def by_file_name(name: str) -> Source | None:
    """The weights that are called ``name``, a file's or a folder's without its path."""
    return next((source for source in SOURCES if source.name == name), None)


def listing(alpha: float | None = None, resize: int | None = None) -> str:
    """A table of what is published, of all variants or those with this ``alpha`` and ``resize``.

    Raises:
        InputError: there is nothing.
    """
    chosen = [source for source in SOURCES if alpha in (None, source.alpha) and resize in (None, source.resize)]
    if not chosen:
        wanted = [f"{name} {value}" for name, value in (("alpha", alpha), ("resize", resize)) if value is not None]
        alphas = ", ".join(str(value) for value in sorted({source.alpha for source in SOURCES}, reverse=True))
        raise InputError(f"no weights are published of {' at '.join(wanted)}; of alpha there are {alphas}")
    variants = sorted({(source.alpha, source.resize) for source in chosen}, reverse=True)
    rows = [_HEADING, *(_row(source) for variant in variants for source in sources(*variant))]
    return "\n".join(_aligned(rows))


def _row(source: Source) -> tuple[str, ...]:
    known = source.weights.sha256
    return (
        f"{source.alpha}_{source.resize}",
        source.origin,
        f"{source.accuracy.top1}",
        f"{source.accuracy.top5}",
        "-" if source.megabytes is None else f"{source.megabytes:g}",
        "-" if known is None else "whole" if len(known) == _DIGITS else f"{len(known)} hex",
        source.licence or "not stated",
        source.name + ("/" if source.is_folder else "") + (" (to convert)" if source.conversion else ""),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        " ".join(
            cell.rjust(width) if title in _NUMBERS else cell.ljust(width)
            for cell, width, title in zip(row, widths, _HEADING, strict=True)
        ).rstrip()
        for row in rows
    ]
