"""Text files that are written whole or not at all."""

from pathlib import Path

from teachers.files import atomic


def write_text(path: Path, text: str) -> None:
    """Writes a text file; a process that is killed meanwhile leaves the old file or none."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")
