"""Writes one tar shard, and makes the keys of its samples."""

import hashlib
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from data.files import publish
from data.intake import Sample

_NOT_IN_KEYS = re.compile(r"[.\x00-\x1f\x7f]")  # a key ends at the first dot of the name


class OpenShard:
    """A shard that is written under a hidden name until it is complete.

    Args:
        final: path of the complete shard.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._partial = final.with_name(f".{final.name}.tmp")
        # GNU headers hold names of any length, and no fields but those set here.
        self._tar = tarfile.open(self._partial, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._samples = 0

    def has_room(self, sample: Sample, target_size: int) -> bool:
        """Whether the shard would not exceed the target size in bytes with this sample."""
        blocks = self._tar.offset + len(sample.data) + 4 * tarfile.BLOCKSIZE  # header, pad, end
        return -(-blocks // tarfile.RECORDSIZE) * tarfile.RECORDSIZE <= target_size

    def add(self, key: str, sample: Sample) -> None:
        """Appends an image, with time 0, so that equal images give equal shards."""
        member = tarfile.TarInfo(f"{key}.{sample.extension}")
        member.size, member.mode = len(sample.data), 0o444
        self._tar.addfile(member, BytesIO(sample.data))
        self._samples += 1

    def publish(self) -> dict[str, Any]:
        """Closes and renames the shard; returns its entry in the manifest."""
        self._tar.close()
        with self._partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._partial.stat().st_size
        publish(self._partial, self._final)
        name = self._final.name
        return {"name": name, "samples": self._samples, "bytes": size, "sha256": digest}

    def discard(self) -> None:
        """Closes the shard and deletes its file, unless it was published."""
        with suppress(OSError):  # closing flushes, which fails on a full disk
            assert self._tar.fileobj is not None
            self._tar.fileobj.close()
        self._partial.unlink(missing_ok=True)


def unique_keys(names: Sequence[str]) -> list[str]:
    """A unique webdataset key for every file name: its path without extension and dots.

    Bytes that are not UTF-8 are replaced. Keys that would be equal get `_2`, `_3`, ...
    """
    keys: dict[str, None] = {}
    for name in names:
        stem = name.rpartition(".")[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        base = key = _NOT_IN_KEYS.sub("_", stem)
        number = 2
        while key in keys:
            key, number = f"{base}_{number}", number + 1
        keys[key] = None
    return list(keys)
