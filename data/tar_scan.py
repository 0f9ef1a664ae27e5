"""Scans the headers of a tar shard for the places of its images and for defects.

Only images are read. Members with other extensions (`.json`, `.txt`, `.cls`, but also `.pkl`,
`.pth`, `.gz`) are never opened, so nothing in a shard can run code or be decompressed.
"""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from data.batch import BadSample
from data.image_files import IMAGE_EXTENSIONS, IMAGES, is_hidden
from data.tar_walk import MAX_IMAGE_BYTES, TarWalk

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)  # webdataset: the first dot


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
        hidden: names of members that would be images, were they not hidden.
    """

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    bad: list[BadSample] = field(default_factory=list)
    broken: str | None = None
    hidden: list[str] = field(default_factory=list)


class MemberFilter:
    """Decides for each member of `shard` whether it is an image, for index and streaming.

    Attributes:
        bad: samples that cannot be read, so far.
        hidden: names of members that would be images, were they not hidden.
    """

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._images: set[str] = set()
        self._others: dict[str, str] = {}
        self.bad: list[BadSample] = []
        self.hidden: list[str] = []

    def image_key(self, member: tarfile.TarInfo) -> str | None:
        """The sample's key if the member is its image, else None."""
        name = _printable(member.name)
        split = split_name(name)
        if not member.isdir() and is_hidden(name):
            if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                self.hidden.append(name)
            return None
        if member.isdir() or split is None:
            return None
        key, extension = split
        if extension not in IMAGE_EXTENSIONS:
            self._others.setdefault(key, extension)
            return None
        reason = None
        if not member.isreg() or member.issparse():
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
                reason = f"no image ({IMAGES}); there is a .{extension}"
                self.bad.append(BadSample(self._shard, key, reason))


def scan_shard(path: Path, name: str) -> ShardScan:
    """Reads all headers of the shard `name`, also after a damaged one, where tarfile stops."""
    scan, members = ShardScan(), MemberFilter(name)
    try:
        with path.open("rb") as file:
            walk = TarWalk(file, name, path.stat().st_size)
            for item in walk:
                if isinstance(item, BadSample):
                    scan.bad.append(item)
                    continue
                key = members.image_key(item)
                if key is not None and walk.broken is None:
                    scan.keys.append(key)
                    scan.offsets.append(item.offset_data)
                    scan.sizes.append(item.size)
            scan.broken = walk.broken
    except OSError as error:
        scan.broken = f"not readable as a tar file ({error})"
    members.finish()
    scan.bad += members.bad
    scan.hidden = members.hidden
    return scan
