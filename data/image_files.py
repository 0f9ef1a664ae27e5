"""Which files are images, for every reader of this project, and the report of those left out."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from data.text import shown

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
IMAGES = "jpg, jpeg, png, webp"  # in messages

# Pictures of other formats. Their decoders are less tested against hostile files, so that they are
# named and never read.
PICTURES = frozenset(
    (
        *("apng", "arw", "avif", "bmp", "cr2", "cr3", "dib", "dng", "eps", "exr", "gif", "hdr"),
        *("heic", "heif", "icns", "ico", "j2k", "jfif", "jp2", "jpe", "jpf", "jpx", "jxl", "nef"),
        *("pbm", "pcx", "pfm", "pgm", "pnm", "ppm", "psd", "qoi", "raf", "raw", "rw2", "sgi"),
        *("svg", "tga", "tif", "tiff"),
    )
)
_COMPANIONS = frozenset(
    (
        *("cls", "csv", "html", "json", "jsonl", "log", "mat", "md", "npy", "npz", "pdf", "tsv"),
        *("txt", "xml", "yaml", "yml"),
    )
)
# Files of systems and editors: hidden ones, those of archives made on a Mac, thumbnails.
_HIDDEN = re.compile(
    r"(?:^|/)(?:\.(?!\.?(?:/|$))|__MACOSX(?:/|$)|@eaDir(?:/|$)|(?:thumbs\.db|desktop\.ini)$)",
    re.IGNORECASE,
)
_NAMED = 3  # files of each kind in a report

_log = logging.getLogger(__name__)
_reported: set[tuple[str, str]] = set()


def extension_of(name: str) -> str:
    """The extension of a file name in lower case, without the dot; empty if it has none."""
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def is_hidden(name: str) -> bool:
    """Whether a relative path is hidden, or of a file that a system or an editor added."""
    return _HIDDEN.search(name) is not None


def is_image(name: str) -> bool:
    """Whether a relative path is that of an image that is read: by extension, and not hidden."""
    return extension_of(name) in IMAGE_EXTENSIONS and not is_hidden(name)


def kind_of(name: str) -> str:
    """The kind under which what is no image is counted: `.tif`, `(none)`, `hidden` or `folder`."""
    if is_hidden(name):
        return "hidden"
    if name.endswith("/"):
        return "folder"
    extension = extension_of(name)
    return f".{extension}" if extension else "(none)"


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """The number of files of each kind, sorted by kind."""
    return dict(sorted(Counter(map(kind_of, names)).items()))


def describe_left_out(names: Sequence[str]) -> str:
    """The files of each kind, counted, with the first names: `2 .tif (a.tif, b/c.tif)`."""
    parts = []
    for kind, count in count_kinds(names).items():
        first = sorted(name for name in names if kind_of(name) == kind)[:_NAMED]
        more = ", ..." if count > len(first) else ""
        parts.append(f"{count} {shown(kind, 20)} ({', '.join(shown(n, 80) for n in first)}{more})")
    return ", ".join(parts)


def report_left_out(
    where: Path | str, names: Sequence[str], allowed: str = f"images are {IMAGES}"
) -> None:
    """Warns once that files of a source are left out; not of those that accompany images.

    Args:
        where: the folder or archive.
        names: of its files that are not read, relative to it.
        allowed: what is read, for the message.
    """
    strange = [name for name in names if is_hidden(name) or extension_of(name) not in _COMPANIONS]
    if strange:
        warn_once(where, f"left out {describe_left_out(strange)}; {allowed}")


def warn_once(where: Path | str, text: str) -> None:
    """Logs a warning about a source, once in a process, and on the first rank only."""
    key = (str(where), text)
    if key in _reported or os.environ.get("RANK", "0") != "0":
        return
    _reported.add(key)
    _log.warning("'%s': %s", shown(where), text)
