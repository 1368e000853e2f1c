"""What was measured on GPUs, by their names, and what follows: which tile a kernel takes, and which path is run.

``measured.json`` is written by ``python -m bench.tune``; where it is missing, or hasn't a device, nothing was measured:

    {"NVIDIA H100 80GB HBM3": {
        "tiles": [{"op": "P2", "shape": {"c_in": 24, ...}, "tile": {"COLUMNS": 8, ...}, ...}],
        "paths": [{"op": "inference block", "shape": {"c_in": 24, ...}, "dtype": "float16",
                   "us_an_image": {"kernels": 0.3, "torch": 0.9, "compiled": 0.7}, ...}],
        ...}}

A tile goes by the arguments of its chooser, a path by an operation's sizes and type. Neither goes by the batch, as an
epoch's last batch must take the tiles and paths of the others.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast

import torch

from . import common

TABLES = Path(__file__).with_name("measured.json")
PATHS = ("kernels", "torch", "compiled")

Key = tuple[Hashable, ...]
Shape = Mapping[str, int]
P = ParamSpec("P")
Found = TypeVar("Found")
Tile = TypeVar("Tile", bound=Any)  # a named tuple
Others = Callable[[Tile, Mapping[str, Any]], Iterable[Tile]]


class Table(NamedTuple):
    """Of one device: fields of the best tile, and microseconds an image of each path, by ``_key``."""

    tiles: Mapping[Key, Mapping[str, Any]]
    paths: Mapping[Key, Mapping[str, float]]


def _key(op: str, shape: Shape, dtype: str = "") -> Key:
    return op, dtype, *sorted(shape.items())


def indexed(tables: Mapping[str, Any]) -> dict[str, Table]:
    """Tables as the file has them, by key."""
    found = {}
    for name, table in tables.items():
        tiles = {_key(row["op"], row["shape"]): {**row["tile"]} for row in table["tiles"]}
        rows = ((row, {path: float(us) for path, us in row["us_an_image"].items()}) for row in table["paths"])
        found[name] = Table(tiles, {_key(row["op"], row["shape"], row["dtype"]): us for row, us in rows})
    return found


def read(path: Path) -> dict[str, Any]:
    """The tables of a file by device, none where there is no such file.

    Raises:
        RuntimeError: the file holds something else.
    """
    try:
        tables = json.loads(path.read_text())
        indexed(tables)
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RuntimeError(
            f"{path}: expected what `python -m bench.tune` writes, got {type(error).__name__}: {error}; "
            "remove the file and measure again"
        ) from None
    return tables


_remembered: list[Any] = []
_planted: dict[str, Table] | None = None


def remembered(function: Callable[P, Found]) -> Callable[P, Found]:
    """``function``, which depends on the tables, with a cache: it is on the way of every launch."""
    cached = functools.lru_cache(maxsize=1024)(function)  # a server's shapes may never end
    _remembered.append(cached)
    return cast("Callable[P, Found]", cached)


@contextmanager
def planted(tables: Mapping[str, Any]) -> Iterator[None]:
    """Inside, ``tables`` are what was measured: a tuner's trials, or a test's, where "" is a device without a name."""
    global _planted
    before, _planted = _planted, indexed(tables)
    _forget()
    try:
        yield
    finally:
        _planted = before
        _forget()


def _forget() -> None:
    for cached in _remembered:
        cached.cache_clear()


@functools.cache
def _tables_of(path: Path) -> dict[str, Table]:
    return indexed(read(path))


@remembered
def _table(name: str) -> Table | None:
    """What was measured on the device of that name; "" is one that is only planned for."""
    if _planted is not None:
        return _planted.get(name)
    return _tables_of(TABLES).get(name) if name else None


@torch.compiler.assume_constant_result  # what torch.compile can't trace it runs, once
def on(device: torch.device) -> bool:
    """Whether anything was measured on ``device``."""
    return _table(common.limits(device).name) is not None


def fields_of(tile: Any) -> dict[str, Any]:
    """What makes a tile, as the tables have it; the spills that a row declares are no part of it."""
    return {name: value for name, value in tile._asdict().items() if name != "spill_bytes"}


class Choice(Generic[P, Tile]):
    """A chooser of tiles: the one that was measured to be best on the device, else what ``default`` says.

    Both have the same arguments, ``element_size`` and ``limits`` among them: of these ``limits`` names the device, and
    the others are the shape. ``others`` lists, from the default and the arguments by name, tiles that give the same
    results, of which a measurement may choose. fp32 has none: its factors take twice the registers, and what still
    fits is too little to choose from.
    """

    def __init__(self, op: str, default: Callable[P, Tile], others: Others[Tile]) -> None:
        self.op, self.default, self._others = op, default, others
        self._signature = inspect.signature(default)
        self._remembered: Callable[P, Tile] = remembered(self._chosen)
        functools.update_wrapper(self, default)

    def __call__(self, *arguments: P.args, **keywords: P.kwargs) -> Tile:
        """The tile of a shape on a device."""
        return self._remembered(*arguments, **keywords)

    def candidates(self, *arguments: P.args, **keywords: P.kwargs) -> tuple[Tile, ...]:
        """All tiles that may be chosen, the default first."""
        at, default = self._named(*arguments, **keywords), self.default(*arguments, **keywords)
        others = self._others(default, at) if at["element_size"] == 2 else ()
        found = {tuple(fields_of(tile).values()): tile for tile in (default, *others)}
        return (default, *list(found.values())[1:])

    def shape(self, *arguments: P.args, **keywords: P.kwargs) -> dict[str, int]:
        """The arguments by which a tile is looked up."""
        return {name: value for name, value in self._named(*arguments, **keywords).items() if name != "limits"}

    def _named(self, *arguments: P.args, **keywords: P.kwargs) -> dict[str, Any]:
        return self._signature.bind(*arguments, **keywords).arguments

    def _chosen(self, *arguments: P.args, **keywords: P.kwargs) -> Tile:
        table = _table(self._named(*arguments, **keywords)["limits"].name)
        fields = table and table.tiles.get(_key(self.op, self.shape(*arguments, **keywords)))
        if not fields:
            return self.default(*arguments, **keywords)
        there = self.candidates(*arguments, **keywords)  # a tile that is none of them any more is an older version's
        return next((tile for tile in there if fields_of(tile) == fields), there[0])


def choice(op: str, others: Others[Tile]) -> Callable[[Callable[P, Tile]], Choice[P, Tile]]:
    """Make a rule for the tile of ``op`` the default of a ``Choice``."""
    return lambda default: Choice(op, default, others)


@remembered
def _microseconds(name: str, op: str, dtype: torch.dtype, **shape: int) -> Mapping[str, float]:
    """Microseconds an image of each path of ``op`` on the device of that name, as far as they were measured."""
    table = _table(name)
    return (table and table.paths.get(_key(op, shape, str(dtype).removeprefix("torch.")))) or {}


@torch.compiler.assume_constant_result
def _faster(path: str, op: str, device: torch.device, dtype: torch.dtype, **shape: int) -> str | None:
    us = _microseconds(common.limits(device).name, op, dtype, **shape)
    if path not in us or "kernels" not in us or us[path] >= us["kernels"]:
        return None
    who = "torch.compile is" if path == "compiled" else "torch's convolutions are"
    return f"{who} faster here, {us[path]:.3g} us an image against {us['kernels']:.3g} (measured)"


def why_torch(op: str, device: torch.device, dtype: torch.dtype, **shape: int) -> str | None:
    """Why torch is to run ``op`` of this shape, by what was measured on ``device``; None where the kernels are fastest.

    Compared is what can run: while torch.compile or export traces, what it would compile; else torch's operations.
    """
    if not on(device):
        return None
    if not torch.compiler.is_compiling():
        return _faster("torch", op, device, dtype, **shape)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    for size in shape.values():
        if not has_static_value(size):  # torch.compile takes it for any size, and one size was measured
            return None
    return _faster("compiled", op, device, dtype, **shape)


def advice(op: str, device: torch.device, dtype: torch.dtype, **shape: int) -> str:
    """What to do where torch.compile was measured to be fastest of all, else nothing."""
    us = _microseconds(common.limits(device).name, op, dtype, **shape)
    others = [us[path] for path in ("kernels", "torch") if path in us]
    if "compiled" not in us or not others or us["compiled"] >= min(others):
        return ""
    return f"torch.compile is faster: {us['compiled']:.3g} us an image against {min(others):.3g}; compile the network"
