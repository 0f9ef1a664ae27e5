"""One shard on its way to disk, and the keys of its samples."""

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

_NOT_IN_KEYS = re.compile(r"[.\x00-\x1f\x7f]")  # the first dot of a member ends its key


class OpenShard:
    """A shard that is being written under a hidden name.

    Args:
        final: the name it will have.
    """

    def __init__(self, final: Path) -> None:
        self._final = final
        self._part = final.with_name(f".{final.name}.tmp")
        # GNU headers hold names of any length, and nothing but what is set here
        self._tar = tarfile.open(self._part, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        self._samples = 0

    def has_room(self, sample: Sample, target_size: int) -> bool:
        """Whether the shard, closed behind this sample, keeps to the target."""
        blocks = self._tar.offset + len(sample.data) + 4 * tarfile.BLOCKSIZE  # header, pad, end
        return -(-blocks // tarfile.RECORDSIZE) * tarfile.RECORDSIZE <= target_size

    def add(self, key: str, sample: Sample) -> None:
        """Appends an image; its time is 0, so that equal images give equal shards."""
        member = tarfile.TarInfo(f"{key}.{sample.extension}")
        member.size, member.mode = len(sample.data), 0o444
        self._tar.addfile(member, BytesIO(sample.data))
        self._samples += 1

    def publish(self) -> dict[str, Any]:
        """Closes the shard, gives it its name, and returns its entry in the manifest."""
        self._tar.close()
        with self._part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = self._part.stat().st_size
        publish(self._part, self._final)
        name = self._final.name
        return {"name": name, "samples": self._samples, "bytes": size, "sha256": digest}

    def discard(self) -> None:
        """Removes what has not been published."""
        with suppress(OSError):  # closing flushes, which a full disk refuses once more
            assert self._tar.fileobj is not None
            self._tar.fileobj.close()
        self._part.unlink(missing_ok=True)


def unique_keys(names: Sequence[str]) -> list[str]:
    """A webdataset key for every file name: its path without extension, no dots, none twice.

    Bytes that are no UTF-8 are replaced; a name whose key is taken gets `_2`, `_3`, ...
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
