"""Reads the images and the defects of one shard at a URL in a single sequential pass.

webdataset opens the URL and `TarWalk` reads the archive, as for the index of local shards:
webdataset's own reader hides sizes and links, and ends silently at a damaged header.
"""

import os
import signal
from collections.abc import Iterator
from typing import IO, NamedTuple
from urllib.parse import unquote, urlparse

from webdataset import utils
from webdataset.gopen import gopen, gopen_schemes, set_options

from data.batch import BadSample
from data.errors import DataError, did_you_mean
from data.shards import is_url
from data.tar_scan import MemberFilter
from data.tar_walk import TarWalk


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
    members, walk = MemberFilter(name), TarWalk(file, name)
    try:
        for item in walk:
            if isinstance(item, BadSample):
                yield item
            elif (key := members.image_key(item)) is not None and walk.broken is None:
                data = walk.read(item)
                if walk.broken is None:
                    yield StreamedImage(name, key, data)
        broken = walk.broken
    except OSError as error:
        broken = f"not readable as a tar file ({error})"
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
        # A path may have bytes that are not UTF-8.
        path = unquote(urlparse(url).path, errors="surrogateescape") if scheme else url
        return open(path, "rb")
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
