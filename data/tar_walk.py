"""Walks over the members of a tar file, forwards, from a file or a stream: one way for all readers.

Python's tarfile reads the headers, but stops silently at some damage and skips other. The walk
goes on after every damaged header, names the gaps, and tells why the rest is missing, if it is.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, cast

from data.batch import BadSample
from data.content import describe_content
from data.text import shown

MAX_IMAGE_BYTES = 1 << 29  # larger than any image within `max_pixels`; bounds memory
BLOCK = 512  # bytes of a tar header, and the unit of all sizes
_SKIP = 1 << 20


class TarWalk:
    """The members of a tar file in their order, and the gaps between them.

    Args:
        file: at its beginning; a stream is read forwards only.
        shard: its name in bad samples.
        length: of a file on disk in bytes, in which data are skipped; None for a stream.

    Attributes:
        broken: after the walk, or with its last member, why an unknown number of members is
            missing; None where the archive is complete.
    """

    def __init__(self, file: IO[bytes], shard: str, length: int | None = None) -> None:
        self._source = _Source(file, length)
        self._shard = shard
        self._noun = "stream" if length is None else "file"
        self._inside: tarfile.TarInfo | None = None  # the member whose data come next
        self.broken: str | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo | BadSample]:
        """Yields members, also links and folders, and a bad sample for each gap before one."""
        end = 0
        while self.broken is None and not self._source.ended:
            for member, following in self._members():
                if following <= member.offset or member.offset < end:
                    self.broken = f"a header at byte {member.offset} points backwards"
                    break
                if self._source.unread is not None and self._source.unread < member.offset:
                    yield self._gap(end, member.offset)
                if member.offset_data + member.size > following:
                    member.sparse = b""  # it states another size than is stored
                self._source.unread, self._inside, end = None, member, following
                if self._source.ends_before(_end_of_data(member)):
                    self.broken = self._cut()
                yield member
                if self.broken is not None:
                    break
        if self.broken is None:
            yield from self._finish(end)

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The data of the member that was yielded last; sets `broken` if they are cut off."""
        data = self._source.read(member.size)
        if len(data) < member.size:
            self.broken = self._cut()
        return data

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, int]]:
        """Members with the positions behind them, up to a header that tarfile gives up at."""
        file = cast("IO[bytes]", self._source)
        try:
            # With "r:" nothing is decompressed, and damaged headers are skipped.
            with tarfile.open(
                fileobj=file,
                mode="r:",
                ignore_zeros=True,
                encoding="utf-8",
                errors="surrogateescape",
            ) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                    yield member, tar.offset
        except tarfile.ReadError:  # a damaged header behind one for a long name, or the end
            return
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            self.broken = f"not readable as a tar file ({error})"

    def _finish(self, end: int) -> Iterator[BadSample]:
        source = self._source
        if end == 0:
            self.broken = f"the {self._noun} {source.describe()}"
        elif self._inside is not None and source.tell() < _end_of_data(self._inside):
            self.broken = self._cut()
        elif source.unread is not None:
            yield self._gap(end, source.tell())
        elif source.tell() - end < BLOCK:
            at = source.tell()
            self.broken = f"the {self._noun} ends at byte {at} without an end-of-archive mark"

    def _cut(self) -> str:
        assert self._inside is not None
        return f"the {self._noun} ends inside the member '{shown(self._inside.name)}'"

    def _gap(self, start: int, stop: int) -> BadSample:
        reason = f"bytes {start} to {stop} belong to no readable member (a damaged header?)"
        return BadSample(self._shard, "", reason)


def _end_of_data(member: tarfile.TarInfo) -> int:
    """Where the data of a plain file end; links and folders have none, sparse files other sizes."""
    plain = member.isreg() and not member.issparse()
    return member.offset_data + (member.size if plain else 0)


class _Source:
    """The file interface that tarfile needs, over a file that is only read forwards.

    Attributes:
        unread: position of the first nonzero block that was read as a header after the last member.
        ended: whether the end was reached.
    """

    def __init__(self, file: IO[bytes], length: int | None) -> None:
        self._file = file
        self._length = length
        self._at = 0
        self._head = b""
        self._global_until = 0  # the end of a header for all members
        self.unread: int | None = None
        self.ended = False

    def read(self, size: int) -> bytes:
        if size > MAX_IMAGE_BYTES:
            raise tarfile.ReadError(f"a header has a size of {size} bytes")
        data = self._file.read(size)
        if self._at == 0:
            self._head = data[:64]
        if size == BLOCK and self.unread is None and data.count(0) != len(data):
            self._note_header(data)
        self._at += len(data)
        self.ended = self.ended or len(data) < size
        return data

    def _note_header(self, block: bytes) -> None:
        """tarfile does not return global headers as members; they and their data are no gap."""
        if self._at < self._global_until:
            return
        if block[156:157] == tarfile.XGLTYPE:
            try:
                size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
                self._global_until = self._at + BLOCK + -(-size // BLOCK) * BLOCK
                return
            except tarfile.HeaderError:
                pass
        self.unread = self._at

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.ReadError(f"a header before byte {self._at} points backwards")
        if self._length is not None:
            self._at = min(position, self._length)
            self._file.seek(self._at)
            return
        while self._at < position:
            data = self._file.read(min(_SKIP, position - self._at))
            if not data:
                self.ended = True
                break
            self._at += len(data)

    def ends_before(self, position: int) -> bool:
        return self._length is not None and position > self._length

    def describe(self) -> str:
        """Why there is no member."""
        if not self._at:
            return "is empty"
        if self.unread is None:
            return "is an archive without members"
        kind = describe_content(self._head)
        return f"is not a tar file; it begins with {self._head[:16]!r}" + (
            f" ({kind})" if kind else ""
        )
