"""Facts of compiled blocks and heads beside their tiles: ``kernels/tiles.json``, from which ``explain`` has bounds.

A row is a launch on sm_90 in half precision with symmetric padding, known by ``kernels.tiles.record_key`` and a side.
Its ``trips`` are those of the loop as it was compiled, fewer than the launch's where the assembler has unrolled it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import replace_file

if TYPE_CHECKING:
    from bench.aot import Row
    from bench.sass import Facts

COMPARED = ("registers", "spill", "shared", "instructions")
KEPT = (*COMPARED, "warps", "tensor_core", "wavefronts", "macs", "loop", "loop_wavefronts", "loop_macs")
Key = tuple[Any, ...]


def recorded(path: Path) -> dict[Key, Facts]:
    """Facts by ``record_key`` and side, or none where there is no file."""
    try:
        return {(*row["key"], row["side"]): row for row in json.loads(path.read_text())["rows"]}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a record of tiles, got {type(error).__name__}: {error}") from error


def keyed(rows: Iterable[Row]) -> dict[Key, Row]:
    """The rows that the record is about, by ``record_key`` and side."""
    from kernels.tiles import record_key

    found = {}
    for row in rows:
        case, tile = row.case, row.work.tile
        if tile is not None and (case.cap, case.dtype, case.padding) == (90, "fp16", "symmetric"):
            head = case.kernel == "head"  # known by its pixels, over which it walks
            c_in, c_mid = (case.C, case.side**2) if head else (case.c_in, case.C)
            key = record_key(case.kernel, c_in, c_mid, case.c_out, case.stride, tile)
            found[(*key, case.side)] = row
    return found


def write(path: Path, command: str, rows: Sequence[Row], compiled: Mapping[str, Facts]) -> None:
    """Replace the record whole, a line a row; nothing is written where a row of it has not been compiled."""
    wanted = keyed(rows)
    if not wanted or any("error" in compiled.get(row.key, {"error": ""}) for row in wanted.values()):
        return
    head = {"command": command, "versions": {name: version(name) for name in ("torch", "triton")}}
    lines = []
    for key, row in sorted(wanted.items()):
        facts = compiled[row.key]
        kept = {name: facts[name] for name in KEPT} | {"trips": row.work.compiled_trips(facts)}
        lines.append(json.dumps({"key": key[:-1], "side": key[-1], **kept}))
    replace_file(path, f'{json.dumps(head)[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def changes(path: Path, rows: Iterable[Row], compiled: Mapping[str, Facts]) -> list[str]:
    """What is no more as it is recorded, by the row's name."""
    before, found = recorded(path), []
    for key, row in keyed(rows).items():
        facts = compiled[row.key]
        if key not in before or "error" in facts:
            continue
        differing = [
            f"{name} {facts[name]}, not {before[key][name]}" for name in COMPARED if facts[name] != before[key][name]
        ]
        if differing:
            found.append(f"{row.case.name}: {'; '.join(differing)} as in {path.name}: `python -m bench.aot --all` anew")
    return found
