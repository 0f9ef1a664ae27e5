"""Text and JSON lines files that are written whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from teachers.files import atomic


def write_text(path: Path, text: str) -> None:
    """Writes a text file; a process that is killed meanwhile leaves the old file or none."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; none if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
