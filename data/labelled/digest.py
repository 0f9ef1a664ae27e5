"""The identity of the files of a data set.

A record has two digests. `times` is of names, sizes and times of modification: quick, but a copy of
the files has other times. `contents` is of names and contents: equal for every copy. It reads all
files, so it is made for small sets, and for larger ones where a recipe asks for it.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.errors import DataError
from data.read_ahead import read_ahead
from data.text import shown

DigestMode = Literal["auto", "times", "contents"]
CONTENTS_BYTES = 2_000_000_000  # sets up to this size are read whole by `auto`
_BLOCK = 1 << 20


class FileFacts(NamedTuple):
    """A file: its name below the root, bytes, and times in nanoseconds."""

    name: bytes
    path: Path
    size: int
    modified: int
    changed: int


def file_facts(files: Sequence[Path], root: Path) -> list[FileFacts]:
    """The facts of files, sorted by name.

    Raises:
        DataError: a file cannot be looked at.
    """

    def facts(path: Path) -> FileFacts:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"'{shown(path)}' cannot be read ({error.strerror})") from error
        name = os.fsencode(os.path.relpath(path, root))
        return FileFacts(name, path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    return sorted(facts(path) for path in files)


def stamp(facts: Sequence[FileFacts], parsed: str = "") -> str:
    """A digest that changes whenever a file may have changed, and also when it was only moved.

    The change time (ctime) counts, which no program can set back.
    """
    lines = (f"{f.size} {f.modified} {f.changed} ".encode() + f.name for f in facts)
    return _sha256([*lines, parsed.encode()])


def record_of(facts: Sequence[FileFacts], mode: DigestMode, parsed: str = "") -> dict[str, Any]:
    """The record of some files, as JSON.

    It has their number, `bytes`, the digests `times` and `contents` (None if they were not read),
    and `newest`, when the last of them changed, in seconds since 1970.

    Args:
        facts: of the files.
        mode: whether to read the contents; `auto` up to CONTENTS_BYTES.
        parsed: further content, such as parsed annotations.

    Raises:
        DataError: a file cannot be read.
    """
    total = sum(each.size for each in facts)
    whole = mode == "contents" or (mode == "auto" and total <= CONTENTS_BYTES)
    end = parsed.encode()
    times = _sha256([*(f"{f.size} {f.modified} ".encode() + f.name for f in facts), end])
    contents = None
    if whole:
        hashes = read_ahead(hash_of, [each.path for each in facts])
        contents = _sha256([*(h + b" " + f.name for h, f in zip(hashes, facts, strict=True)), end])
    newest = max((max(each.modified, each.changed) for each in facts), default=0) / 1e9
    digests = {"times": times, "contents": contents}
    return {"files": len(facts), "bytes": total, **digests, "newest": newest}


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of the same data: by contents where both know them, else by times."""
    key = "contents" if one["contents"] and other["contents"] else "times"
    return bool(one[key] == other[key])


def hash_of(path: Path) -> bytes:
    """The SHA-256 of a file's content; DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"'{shown(path)}' cannot be read ({error.strerror})") from error
    return digest.digest()


def _sha256(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(len(part)).encode() + b":" + part)
    return digest.hexdigest()[:32]
