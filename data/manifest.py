"""`manifest.json`, which lists the shards that `data.write_shards` wrote, and their source.

It is written before the first shard and after each, so that it never lists a missing shard. While
its `complete` is false, `.journal` beside it lists the samples of the shards.
"""

import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any, Self

from data.errors import DataError
from data.files import publish

MANIFEST = "manifest.json"
_JOURNAL = ".journal"
_RECORD = struct.Struct("<16sQ")
Manifest = dict[str, Any]


def load_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a folder: file name to entry of each shard; empty without one.

    Raises:
        DataError: the file is not such a manifest, or not all shards are written.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    if not manifest["complete"]:
        raise DataError(
            f"{folder}: data.write_shards has not finished here; run it again to continue"
        )
    return {shard["name"]: shard for shard in manifest["shards"]}


def read_manifest(folder: Path) -> Manifest | None:
    """Reads the whole manifest, complete or not; None where there is none.

    Raises:
        DataError: the file is not such a manifest.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest: Manifest = json.loads(path.read_text())
        manifest["complete"], [shard["name"] for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of data.write_shards ({error!r})") from error
    return manifest


def store_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest atomically."""
    partial = folder / f".{MANIFEST}.tmp"  # the same in every process: a kill leaves at most one
    try:
        partial.write_text(json.dumps(manifest, indent=1) + "\n")
        publish(partial, folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


class Journal:
    """Digest and number in the source of every sample written so far; also locks the folder.

    Raises:
        DataError: another process has locked the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _JOURNAL
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"another data.write_shards is writing into '{folder}'") from None

    def load(self, samples: int) -> list[tuple[bytes, int]]:
        """Reads the records of the first `samples` samples and deletes those after them.

        Raises:
            DataError: there are fewer records.
        """
        self._file.seek(0)
        data = self._file.read(samples * _RECORD.size)
        if len(data) < samples * _RECORD.size:
            raise DataError(
                f"{self._path}: has fewer samples than the manifest; empty the folder and start "
                "again"
            )
        self._file.truncate(len(data))
        return list(_RECORD.iter_unpack(data))

    def add(self, records: list[tuple[bytes, int]]) -> None:
        """Appends records and flushes them to disk; call it before storing the manifest."""
        self._file.write(b"".join(_RECORD.pack(*record) for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Deletes the file, when all shards are written."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not os.fstat(self._file.fileno()).st_size:  # no record, as after an error
            self.remove()
        self._file.close()
