"""Reads the images and the defects of one shard at a URL in a single sequential pass.

webdataset opens the URL and Python's tarfile reads the archive, because webdataset's own reader
hides what `MemberFilter` needs (sizes, links) and ends silently at a damaged header.
"""

import os
import signal
import tarfile
from collections.abc import Generator, Iterator
from typing import IO, NamedTuple, cast
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset import utils
from webdataset.gopen import gopen, gopen_schemes, set_options

from data.batch import BadSample
from data.errors import DataError, did_you_mean
from data.shards import is_url
from data.tar_scan import BLOCK, MAX_IMAGE_BYTES, MemberFilter, gap

_SKIP = 1 << 20


class StreamedImage(NamedTuple):
    """An undecoded image of a shard.

    Attributes:
        shard: name of the shard.
        key: inside the shard.
        data: bytes of the image file.
    """

    shard: str
    key: str
    data: bytes


def check_url(shard: str) -> None:
    """Raises an error for a URL that webdataset cannot open.

    Raises:
        DataError: the scheme is unknown; lists the known ones, and how to use object stores.
    """
    scheme = _scheme(shard)
    known = sorted({"file", *gopen_schemes} - {"__default__"})
    if scheme in ("", *known):
        return
    if scheme == "s3":
        hint = f"use 'pipe:aws s3 cp {shard} -' and set data.allow_pipe=true"
    else:
        hint = f"allowed: {', '.join(known)}{did_you_mean(scheme, known)}"
    raise DataError(f"data.sources.shards: nothing opens '{scheme}:' of '{shard}'; {hint}")


def read_shard(
    url: str, name: str, *, allow_pipe: bool = False
) -> Iterator[StreamedImage | BadSample]:
    """Yields the images of a shard in its own order, and its defects where they occur.

    A stream that breaks off yields the images before the break, then one `BadSample`.

    Args:
        url: of the shard, or its local path.
        name: of the shard, for keys.
        allow_pipe: whether the URL may run a shell command.
    """
    try:
        file = _open(url, allow_pipe)
    except (OSError, ValueError) as error:
        yield BadSample(name, "", f"cannot be opened ({error})")
        return
    members = MemberFilter(name)
    stream = _Stream(file)
    try:
        broken = yield from _walk(stream, name, members)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        broken = stream.kind() if not stream.members else f"not readable as a tar file ({error})"
    finally:
        file.close()
    members.finish()
    yield from members.bad
    status = getattr(file, "status", None)  # exists where `file` is webdataset's Pipe
    if status not in (None, -signal.SIGPIPE, *getattr(file, "ignore_status", ())):
        broken = f"its download or command ended with status {status}" + (
            f"; {broken}" if broken else ""
        )
    if broken:
        yield BadSample(name, "", broken)


def _scheme(shard: str) -> str:
    return shard.partition(":")[0].lower() if is_url(shard) else ""


def _open(url: str, allow_pipe: bool) -> IO[bytes]:
    scheme = _scheme(url)
    if scheme in ("", "file"):
        return open(url2pathname(urlparse(url).path) if scheme else url, "rb")
    before = utils.enforce_security
    strict = bool(int(os.environ.get("WDS_SECURE", "0")))
    utils.enforce_security = strict or not allow_pipe  # $GOPEN_REWRITE can turn URLs into pipes
    try:
        file = gopen(url, "rb")
    finally:
        utils.enforce_security = before
    # By default a Pipe raises as soon as its process has failed, even with data left to be read.
    # The number of samples would depend on timing, and the message would contain tokens.
    set_options(file, ignore_errors=True)
    return file


class _Stream:
    """The file interface that tarfile needs, over a file that can only be read forwards.

    Attributes:
        members: archive members read so far.
        unread: position of the first nonzero block that was read as a header after the last member.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0
        self._head = b""
        self.members = 0
        self.unread: int | None = None

    def read(self, size: int) -> bytes:
        if size > MAX_IMAGE_BYTES:
            raise tarfile.ReadError(f"a header has a size of {size} bytes")
        data = self._file.read(size)
        if self._at == 0:
            self._head = data[:16]
        if size == BLOCK and self.unread is None and data.count(0) != len(data):
            self.unread = self._at
        self._at += len(data)
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.ReadError(f"a header before byte {self._at} points backwards")
        while self._at < position:
            data = self._file.read(min(_SKIP, position - self._at))
            if not data:
                break
            self._at += len(data)

    def kind(self) -> str:
        """The reason why there is no member."""
        if not self._head:
            return "the stream is empty"
        if not self._head.strip(b"\0"):
            return "the stream is an archive without members"
        return f"the stream is not a tar file; it begins with {self._head!r}"


def _walk(
    stream: _Stream, shard: str, members: MemberFilter
) -> Generator[StreamedImage | BadSample, None, str | None]:
    """Yields images and gaps; returns why the rest of the shard is missing, or None."""
    end = 0
    # With "r:" and a plain file nothing is decompressed, and damaged headers are skipped.
    with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r:", ignore_zeros=True) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
            stream.members += 1
            if stream.unread is not None and stream.unread < member.offset:
                yield gap(shard, end, member.offset)
            key = members.image_key(member)
            if key is not None:
                data = stream.read(member.size)
                if len(data) < member.size:
                    return f"the stream ends inside the member '{member.name}'"
                yield StreamedImage(shard, key, data)
            end = member.offset_data + -(-member.size // BLOCK) * BLOCK
            stream.unread = None
    if end == 0:
        return stream.kind()
    if stream.unread is not None:
        yield gap(shard, end, stream.tell())
    elif stream.tell() - end < BLOCK:
        return f"the stream ends at byte {stream.tell()} without an end-of-archive mark"
    return None
