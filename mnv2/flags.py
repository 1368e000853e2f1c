"""Command lines made from frozen dataclasses.

A field's type, default and help text stand together where it is defined; the flag of a command is the field's name.
Underscores and hyphens are the same in a flag, booleans take true/false/1/0/yes/no, lists take ``30,60`` or ``30 60``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def option(default: Any, help: str, **settings: Any) -> Any:
    """Field of a configuration: its default, its help text and ``choices``, ``parse`` or ``const`` for its flag.

    ``also`` are other names of its flag. A ``fixed`` one can't change when training goes on from a checkpoint: it would
    be another network, other batches, or a state that doesn't fit. A ``positional`` one has no flag: it must be given,
    in its place. One with argparse's ``action`` is argparse's altogether.
    """
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def parse_bool(text: str) -> bool:
    """Truth of ``text``: true/false, 1/0 or yes/no in any case."""
    word = text.lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise ValueError(f"expected true or false, got {text!r}")


def parse_pretrained(text: str) -> bool | str:
    """Truth of ``text`` where it is a boolean, else the path that it is."""
    try:
        return parse_bool(text)
    except ValueError:
        return text


def parse_resume(text: str) -> str | None:
    """None for false, "auto" for true, else the text."""
    try:
        return "auto" if parse_bool(text) else None
    except ValueError:
        return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parse(
    config: type[ConfigT], argv: Sequence[str] | None, description: str, *, program: str | None = None
) -> ConfigT:
    """Read the command line ``argv`` (None: the process's own) into ``config``; ``program`` is what messages call it.

    A flag that is unknown or can't be read ends the process with status 2 and one line.
    """
    parser = _Parser(
        program, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    types = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name = field.name if "positional" in field.metadata else f"--{field.name}"
        also = field.metadata.get("also", ())
        parser.add_argument(name, *also, default=field.default, **_argument(field, types[field.name]))
    if argv is None:
        argv = sys.argv[1:]
    values = vars(parser.parse_args([_underscored(word) for word in argv]))
    for field in dataclasses.fields(config):
        if isinstance(values[field.name], list):
            values[field.name] = _values(parser, field.name, types[field.name], values[field.name])
    try:
        return config(**values)
    except InputError as error:
        parser.error(str(error))


def _argument(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    settings = dict(field.metadata)
    if "action" in settings:
        return settings
    parse_value = settings.pop("parse", None)
    for ours in ("fixed", "positional", "also"):
        settings.pop(ours, None)
    kind = _given(kind)
    if typing.get_origin(kind) is tuple:
        settings.setdefault("metavar", "NUMBER")
        settings.setdefault("nargs", "+")
        kind = str
    elif kind is bool:
        kind = parse_bool
        settings.setdefault("const", True)
    if "const" in settings:
        settings.setdefault("nargs", "?")
    settings["type"] = _told(parse_value or kind)
    if not settings.get("choices"):
        settings.setdefault("metavar", "BOOL" if kind is parse_bool else getattr(kind, "__name__", "value").upper())
    return settings


def _told(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """``read``, whose own words argparse passes on where a text is wrong."""
    if isinstance(read, type):  # int and float have none that a user would understand
        return read

    def told(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return told


def _given(kind: Any) -> Any:
    """The type of a field where it isn't None."""
    if not isinstance(kind, UnionType):
        return kind
    return next(member for member in typing.get_args(kind) if member is not type(None))


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _values(parser: _Parser, name: str, kind: Any, words: list[str]) -> tuple[Any, ...]:
    member, *rest = typing.get_args(_given(kind))
    if member is str:
        return tuple(words)
    wanted = ("integers" if member is int else "numbers") if rest == [...] else "two numbers"
    try:
        numbers = tuple(member(item) for word in words for item in word.split(",") if item)
    except ValueError:
        numbers = ()
    if not numbers or (rest != [...] and len(numbers) != 1 + len(rest)):
        parser.error(f"--{name}: expected {wanted}, got {' '.join(words)}")
    return numbers
