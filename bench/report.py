"""Tables and plots of what benchmarks measured and of what is counted: ``python -m bench.report``.

    python -m bench.report [--tables] [--check] [--results DIR] [--readme FILE]

The README's tables stand between two comments, ``<!-- bench.report: NAME -->`` and ``<!-- /bench.report -->``, and each
is replaced by the one of that name. Plots go to ``plots/`` in the folder of results, as SVG and PNG; the same results
give the same bytes with the same matplotlib. ``--check`` writes nothing and fails where there is anything to change.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnv2.errors import InputError, RunError, exit_status
from mnv2.flags import option, parse

from .files import replace_file
from .results import RESULTS
from .tables import all_tables, measured

README = RESULTS.parent.parent / "README.md"
END = "<!-- /bench.report -->"
MARKER = re.compile(r"<!-- (?:bench\.report: *(?P<name>.*?)|/bench\.report) -->")


@dataclass(frozen=True)
class ReportConfig:
    """What is made, and of what."""

    tables: bool = option(False, "the README's tables alone, which need no matplotlib")
    check: bool = option(False, "write nothing, and fail where README or plots aren't what the results make of them")
    results: str | None = option(None, "folder of the results; None for bench/results", metavar="DIR")
    readme: str | None = option(None, "file whose tables are replaced; None for README.md", metavar="FILE")


def replaced(text: str, tables: Mapping[str, str], where: Path) -> str:
    """``text`` with each table between its comments.

    Raises:
        InputError: a comment is missing, stands twice, has no partner, or is of no table.
    """
    pieces, done, begun = [], 0, ""
    found: list[str] = []
    for match in MARKER.finditer(text):
        line, name = text.count("\n", 0, match.start()) + 1, match["name"]
        if (name is None) != bool(begun):
            raise InputError(f"{where}: line {line}: expected {_expected(begun)}, got {match[0]}")
        if name is None:
            begun, done = "", match.start()
            continue
        if name not in tables or name in found:
            wanted = ", ".join(table for table in tables if table not in found)
            raise InputError(f"{where}: line {line}: expected a table among {wanted}, each once, got {name!r}")
        found.append(name)
        pieces += [text[done : match.end()], f"\n{tables[name]}\n"]
        begun = name
    if begun:
        raise InputError(f"{where}: expected {END} behind that of {begun}, got the file's end")
    if missing := [name for name in tables if name not in found]:
        raise InputError(f"{where}: expected <!-- bench.report: {missing[0]} -->, got none")
    return "".join([*pieces, text[done:]])


def _expected(begun: str) -> str:
    return f"{END} behind that of {begun}" if begun else "the beginning of a table"


def drawn(results: Path, suites: Mapping[str, Sequence[Mapping[str, Any]]], refresh: bool) -> dict[str, bytes]:
    """Every plot by the name of its file.

    Raises:
        RunError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RunError("plots need matplotlib: pip install -e '.[bench]', or --tables for the tables alone")
    from . import plots

    return plots.render(plots.figures(results, suites, refresh=refresh))


def make(config: ReportConfig) -> None:
    """Make tables and plots, then write those that differ from what is there, or with ``check`` name them."""
    results, readme = Path(config.results or RESULTS), Path(config.readme or README)
    if not results.is_dir():
        raise InputError(f"--results: expected a folder, got {results}")
    suites = measured(results)
    text = readme.read_text()
    made = all_tables(results, suites, refresh=not config.check)
    wanted = {readme: replaced(text, made, readme).encode()}
    if not config.tables:
        plots = drawn(results, suites, refresh=not config.check)
        wanted |= {results / "plots" / name: content for name, content in plots.items()}
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_bytes() != content]
    if config.check:
        if stale:
            names = ", ".join(map(str, stale))
            raise RunError(f"{names}: not what {results} makes of it: python -m bench.report makes it anew")
        return
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, wanted[path])
        print(f"{path}: written")
    print(f"{len(wanted) - len(stale)} of {len(wanted)} files were as they should be")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    config = parse(ReportConfig, argv, "Tables and plots of what was measured and of what is counted.")
    return exit_status("bench.report", lambda: make(config))


if __name__ == "__main__":
    sys.exit(main())
