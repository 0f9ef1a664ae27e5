"""Writes files atomically: after a kill or a power failure they are complete or absent."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.content import LFS, describe_content
from data.errors import DataError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which gets its name when the block ends without error.

    Until then a file of that name stays as it was; after an error the temporary one is removed. The
    file has the mode of any new one, by the umask: some libraries write theirs for the owner only.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder, which takes the place of `path` when the block ends without error.

    Until then a folder of that name stays as it was; after an error the temporary one is removed.
    A kill in the moment of the change leaves the old folder as `.NAME.PID.old`.
    """
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(old)
        publish(partial, path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file with one JSON object a line; an empty list if there is no such file.

    Raises:
        DataError: a line is none; names the first.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"'{path}', line {number}: expected an object of JSON; mend or remove the line"
            )
        rows.append(row)
    return rows


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
    """
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def lfs_hint(path: Path) -> str:
    """What to do where a file is only Git LFS's pointer to it; empty for other files."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    return f" (it is {LFS})" if describe_content(head) == LFS else ""


def publish(partial: Path, final: Path) -> None:
    """Flushes a file or folder to disk, then renames it; both lie in one folder."""
    sync(partial)
    partial.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
