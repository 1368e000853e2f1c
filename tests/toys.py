"""A chooser of tiles that no kernel has, and tables that may know a better one."""

from __future__ import annotations

from typing import NamedTuple

from kernels import measured
from kernels.common import Limits

GPU = Limits(132, 232448, name="GPU 100")


class Toy(NamedTuple):
    BLOCK: int
    spill_bytes: int = 0


TOYS = [Toy(size) for size in (1, 2, 3)]


@measured.choice("toy", lambda default, at: TOYS)
def toy_tile(size: int, element_size: int, limits: Limits) -> Toy:
    return TOYS[0]


def toy_row(size: int, block: int):
    return {"op": "toy", "shape": {"size": size, "element_size": 2}, "tile": {"BLOCK": block}}


def table(tiles=(), paths=()):
    """Of one device."""
    return {"tiles": list(tiles), "paths": list(paths)}
