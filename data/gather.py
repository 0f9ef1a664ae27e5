"""Lists the image files of a folder, zip or tar in the order of their names, and reads them.

Names are paths relative to the source, so that a folder and an archive of it give the same list.
"""

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

from data.batch import BadSample
from data.content import COMPRESSED
from data.decode import BadImage
from data.errors import DataError, similar_path
from data.image_files import IMAGES, PICTURES, count_kinds, extension_of, is_image, report_left_out
from data.tar_walk import TarWalk
from data.text import shown

_ENCRYPTED = 1  # of the flags of a zip's member


@dataclass(frozen=True)
class ImageFiles:
    """The files of a source.

    Attributes:
        sizes: image name to bytes of its file, sorted by name.
        left_out: names of files that are no images by their extension, or hidden, sorted.
        damaged: (name, reason) of files that cannot be read.
        read: returns the bytes of an image by its name; callable from several threads. Raises
            BadImage where only this file cannot be read, OSError where the source cannot.
    """

    sizes: dict[str, int]
    left_out: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    read: Callable[[str], bytes]

    @property
    def ignored(self) -> dict[str, int]:
        """Kind of the files that are left out, such as `.txt` or `hidden`, to their number."""
        return count_kinds(self.left_out)

    def readable(self, source: Path) -> Self:
        """Itself; warns of files that are left out.

        Raises:
            DataError: a file is damaged; names the first.
        """
        for name, reason in self.damaged[:1]:
            raise DataError(f"'{shown(source)}', {shown(name)}: {reason}")
        report_left_out(source, self.left_out)
        return self


class _Listing:
    """Collects files; `places` maps each name to where its bytes are."""

    def __init__(self) -> None:
        self.places: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._left_out: list[str] = []
        self._damaged: list[tuple[str, str]] = []

    def add(self, name: str, size: int, place: Any, damage: str | None = None) -> None:
        name = str(PurePosixPath(name.lstrip("/")))
        if not is_image(name):
            self._left_out.append(name)
        elif damage is not None:
            self._damaged.append((name, damage))
        else:
            if name in self.places:
                self._damaged.append((name, "a later member of the archive has the same name"))
            self.places[name], self._sizes[name] = place, size

    @property
    def num_files(self) -> int:
        return len(self._sizes) + len(self._left_out) + len(self._damaged)

    def add_damage(self, name: str, reason: str) -> None:
        self._damaged.append((name, reason))

    def files(self, read: Callable[[str], bytes]) -> ImageFiles:
        return ImageFiles(
            sizes=dict(sorted(self._sizes.items())),
            left_out=tuple(sorted(self._left_out)),
            damaged=tuple(sorted(self._damaged)),
            read=read,
        )


def open_images(source: Path) -> AbstractContextManager[ImageFiles]:
    """Lists the image files (by extension) of a folder, however deep, of a zip or of a tar.

    Raises:
        DataError: the source does not exist, or is none of the three.
    """
    if source.is_dir():
        return _open_folder(source)
    if not source.is_file():
        raise DataError(f"the source '{source}' does not exist{similar_path(source)}")
    if extension_of(source.name) in PICTURES:
        raise DataError(
            f"'{shown(source)}': .{extension_of(source.name)} images are not read, but {IMAGES}; "
            "convert it, as to PNG"
        )
    with source.open("rb") as file:
        magic = file.read(8)
    for start, kind in COMPRESSED.items():
        if magic.startswith(start):
            raise DataError(
                f"'{source}' is compressed ({kind}) and cannot be read in the order of its names; "
                "unpack it and give the folder or the plain tar"
            )
    return _open_zip(source) if magic.startswith(b"PK") else _open_tar(source)


@contextmanager
def _open_folder(folder: Path) -> Iterator[ImageFiles]:
    listing, seen = _Listing(), set()

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder '{error.filename}' cannot be read: {error.strerror}")

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was listed
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in names:
            path = Path(here, name)
            whole = path.is_file()
            damage = None if whole else "a broken link or special file"
            size = path.stat().st_size if whole else 0
            listing.add(path.relative_to(folder).as_posix(), size, path, damage)

    def read(name: str) -> bytes:
        try:
            return bytes(listing.places[name].read_bytes())
        except PermissionError as error:
            raise BadImage(str(error.strerror)) from error

    yield listing.files(read)


@contextmanager
def _open_zip(path: Path) -> Iterator[ImageFiles]:
    listing = _Listing()
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise DataError(f"'{path}' cannot be read as a zip: {error}") from error
        for member in archive.infolist():
            if not member.is_dir():
                damage = _zip_damage(member)
                listing.add(member.filename, member.file_size, member, damage)

        def read(name: str) -> bytes:
            try:
                return archive.read(listing.places[name])
            except OSError:
                raise
            except Exception as error:  # zlib.error, BadZipFile, RuntimeError for a password, ...
                raise BadImage(f"{type(error).__name__}: {error}") from error

        yield listing.files(read)


def _zip_damage(member: zipfile.ZipInfo) -> str | None:
    """Why a member cannot be read, as far as its header tells."""
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link or special file inside the archive"
    return "encrypted with a password" if member.flag_bits & _ENCRYPTED else None


@contextmanager
def _open_tar(path: Path) -> Iterator[ImageFiles]:
    listing = _Listing()
    with path.open("rb") as file:
        broken = _list_tar(TarWalk(file, path.name, path.stat().st_size), path.name, listing)
        if broken and not listing.num_files:
            raise DataError(f"'{shown(path)}' is not a folder, zip or readable tar: {broken}")
        if broken:
            listing.add_damage(path.name, broken)

        def read(name: str) -> bytes:
            offset, size = listing.places[name]
            return os.pread(file.fileno(), size, offset)

        yield listing.files(read)


def _list_tar(walk: TarWalk, archive: str, listing: _Listing) -> str | None:
    """Lists the members; returns why the rest of the archive is missing, or None."""
    for member in walk:
        if isinstance(member, BadSample):
            listing.add_damage(archive, member.reason)
        elif not member.isdir() and walk.broken is None:
            plain = member.isreg() and not member.issparse()
            damage = None if plain else "a link or special file inside the archive"
            listing.add(member.name, member.size, (member.offset_data, member.size), damage)
    return walk.broken
