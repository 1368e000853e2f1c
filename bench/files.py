"""Files that are there whole or as they were."""

from __future__ import annotations

from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``: all of it or nothing."""
    from mnv2.atomic import replacing  # and torch with it, before which bench.aot looks at its environment

    with replacing(str(path)) as temporary:
        Path(temporary).write_bytes(content.encode() if isinstance(content, str) else content)
