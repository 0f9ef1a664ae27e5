"""Lists the image files of a folder, zip or tar in the order of their names, and reads them.

Names are paths relative to the source, so that a folder and an archive of it give the same list.
"""

import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from data.decode import BadImage
from data.errors import DataError, similar_path
from data.tar_scan import IMAGE_EXTENSIONS, scan_shard

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ImageFiles:
    """The files of a source.

    Attributes:
        sizes: image name to bytes of its file, sorted by name.
        ignored: extension that is not an image's to number of files, sorted.
        damaged: (name, reason) of files that cannot be read.
        read: returns the bytes of an image by its name; callable from several threads. Raises
            BadImage where only this file cannot be read, OSError where the source cannot.
    """

    sizes: dict[str, int]
    ignored: dict[str, int]
    damaged: tuple[tuple[str, str], ...]
    read: Callable[[str], bytes]

    def readable(self, source: Path) -> Self:
        """Itself; DataError names the first damaged file of `source`, if any."""
        for name, reason in self.damaged[:1]:
            raise DataError(f"'{source}', {name}: {reason}")
        return self


class _Listing:
    """Collects files; `places` maps each name to where its bytes are."""

    def __init__(self) -> None:
        self.places: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._ignored: Counter[str] = Counter()
        self._damaged: list[tuple[str, str]] = []

    def add(self, name: str, size: int, place: Any, damage: str | None = None) -> None:
        name = str(PurePosixPath(name.lstrip("/")))
        extension = PurePosixPath(name).suffix.lower()
        if extension.removeprefix(".") not in IMAGE_EXTENSIONS:
            self._ignored[extension or "(none)"] += 1
        elif damage is not None:
            self._damaged.append((name, damage))
        else:
            if name in self.places:
                self._damaged.append((name, "a later member of the archive has the same name"))
            self.places[name], self._sizes[name] = place, size

    @property
    def num_files(self) -> int:
        return len(self._sizes) + self._ignored.total() + len(self._damaged)

    def add_damage(self, name: str, reason: str) -> None:
        self._damaged.append((name, reason))

    def files(self, read: Callable[[str], bytes]) -> ImageFiles:
        return ImageFiles(
            sizes=dict(sorted(self._sizes.items())),
            ignored=dict(sorted(self._ignored.items())),
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
    with source.open("rb") as file:
        magic = file.read(8)
    for start, kind in _COMPRESSED.items():
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
                listing.add(member.filename, member.file_size, member)

        def read(name: str) -> bytes:
            try:
                return archive.read(listing.places[name])
            except OSError:
                raise
            except Exception as error:  # zlib.error, BadZipFile, RuntimeError for a password, ...
                raise BadImage(f"{type(error).__name__}: {error}") from error

        yield listing.files(read)


@contextmanager
def _open_tar(path: Path) -> Iterator[ImageFiles]:
    listing = _Listing()
    scan = scan_shard(path, path.name)  # finds the gaps that tarfile skips silently
    broken = scan.broken
    with path.open("rb") as file:
        try:
            _list_tar(file, listing)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            broken = broken or str(error)
        if broken and not listing.num_files:
            raise DataError(f"'{path}' is not a folder, zip or readable tar: {broken}")
        for reason in [bad.reason for bad in scan.bad if not bad.key] + [broken]:
            if reason:
                listing.add_damage(path.name, reason)

        def read(name: str) -> bytes:
            offset, size = listing.places[name]
            return os.pread(file.fileno(), size, offset)

        yield listing.files(read)


def _list_tar(file: IO[bytes], listing: _Listing) -> None:
    end = 0
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
            if member.size < 0 or member.offset < end:
                return  # points backwards, perhaps endlessly; reported by the scan
            end = member.offset_data + member.size
            if not member.isdir():
                plain = member.isreg() and not member.issparse()
                damage = None if plain else "a link or special file inside the archive"
                listing.add(member.name, member.size, (member.offset_data, member.size), damage)
