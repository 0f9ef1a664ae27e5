"""Files that are whole or absent."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a text file under another name, then renames it: a kill leaves the old or the new."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
