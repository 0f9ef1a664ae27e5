"""Scans the headers of a tar shard for the places of its images and for defects.

Only images are read. Members with other extensions (`.json`, `.txt`, `.cls`, but also `.pkl`,
`.pth`, `.gz`) are never opened, so nothing in a shard can run code or be decompressed.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from data.batch import BadSample

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_IMAGE_BYTES = 1 << 29  # larger than any image within `max_pixels`; bounds memory

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # webdataset splits at the first dot
BLOCK = 512  # bytes of a tar header, and the unit of all sizes


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, split as webdataset does; None without either."""
    match = _NAME.match(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def _printable(name: str) -> str:
    """The name with bytes that are not UTF-8 written as `\\xe9`, so that keys can be stored."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass
class ShardScan:
    """The result of one pass over the headers of a shard.

    Attributes:
        keys: of the images, in the order of the file.
        offsets: position of the first byte of each image.
        sizes: bytes of each image.
        bad: samples that cannot be read, and gaps.
        broken: why an unknown number of samples is missing; None where the shard is complete.
    """

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    broken: str | None = None


class MemberFilter:
    """Decides for each member of `shard` whether it is an image, for index and streaming."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._images: set[str] = set()
        self._others: dict[str, str] = {}
        self.bad: list[BadSample] = []

    def image_key(self, member: tarfile.TarInfo) -> str | None:
        """The sample's key if the member is its image, else None."""
        name = split_name(_printable(member.name))
        if member.isdir() or name is None:
            return None
        key, extension = name
        if extension not in IMAGE_EXTENSIONS:
            self._others.setdefault(key, extension)
            return None
        reason = None
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            reason = "the image is a link or special file"
        elif key in self._images:
            reason = f"a second image for the key (.{extension}); the first is used"
        elif not 0 < member.size <= MAX_IMAGE_BYTES:
            reason = f"an image of {member.size} bytes"
        self._images.add(key)
        if reason:
            self.bad.append(BadSample(self._shard, key, reason))
            return None
        return key

    def finish(self) -> None:
        """Adds the keys without an image to `bad`."""
        for key, extension in self._others.items():
            if key not in self._images:
                reason = f"no image (jpg, jpeg, png, webp); there is a .{extension}"
                self.bad.append(BadSample(self._shard, key, reason))


def scan_shard(path: Path, name: str) -> ShardScan:
    """Reads all headers of the shard `name`, also after a damaged one, where tarfile stops."""
    scan, members = ShardScan(), MemberFilter(name)
    end = 0
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            for member in _members(file, length):
                if member.size < 0 or member.offset < end:
                    scan.broken = f"a header at byte {member.offset} points backwards"
                    break
                if _has_bytes(file, _skip_global_headers(file, end, member.offset), member.offset):
                    scan.bad.append(gap(name, end, member.offset))
                key = members.image_key(member)
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.offset_data + member.size > length:
                    scan.broken = f"the file ends inside the member '{member.name}'"
                    break
                if key is not None:
                    scan.keys.append(key)
                    scan.offsets.append(member.offset_data)
                    scan.sizes.append(member.size)
            if scan.broken is None:
                _check_end(scan, file, name, end, length)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        scan.broken = f"not readable as a tar file ({error})"
    members.finish()
    scan.bad += members.bad
    return scan


def _members(file: IO[bytes], length: int) -> Iterator[tarfile.TarInfo]:
    while file.tell() < length:
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, encoding="utf-8") as tar:
                while (member := tar.next()) is not None:
                    yield member
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
            return
        except tarfile.ReadError:  # a damaged header after a pax one: start again after both
            continue


def _has_bytes(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether the file has bytes other than zero in a range; keeps the file's position."""
    here = file.tell()
    file.seek(start)
    found = False
    while start < stop and not found:
        chunk = file.read(min(1 << 20, stop - start))
        if not chunk:
            break
        found = chunk.count(0) != len(chunk)
        start += len(chunk)
    file.seek(here)
    return found


def _skip_global_headers(file: IO[bytes], start: int, stop: int) -> int:
    """The position after global pax headers, which tarfile does not return as members."""
    here = file.tell()
    while start < stop:
        file.seek(start)
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            break
        if header.type != tarfile.XGLTYPE:
            break
        start += BLOCK + -(-header.size // BLOCK) * BLOCK
    file.seek(here)
    return start


def gap(shard: str, start: int, stop: int) -> BadSample:
    """A bad sample for bytes of a shard between its readable members."""
    reason = f"bytes {start} to {stop} belong to no readable member (a damaged header?)"
    return BadSample(shard, "", reason)


def _check_end(scan: ShardScan, file: IO[bytes], shard: str, end: int, length: int) -> None:
    """Checks that the archive ends with blocks of zeros."""
    if end == 0 and length == 0:
        scan.broken = "the file is empty"
    elif end == 0 and not _has_bytes(file, 0, length):
        scan.broken = "the file is an archive without members"
    elif end == 0:
        file.seek(0)
        scan.broken = f"the file is not a tar file; it begins with {file.read(16)!r}"
    elif _has_bytes(file, end, length):
        scan.bad.append(gap(shard, end, length))
    elif length - end < BLOCK:
        scan.broken = f"the file ends at byte {length} without an end-of-archive mark"
