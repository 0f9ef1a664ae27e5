"""The base of data sets on disk, whose error messages show the expected tree."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_serializer

from data.errors import DataError, did_you_mean, similar_path
from data.image_files import (
    IMAGE_EXTENSIONS,
    IMAGES,
    describe_left_out,
    is_hidden,
    kind_of,
    report_left_out,
    warn_once,
)
from data.labelled.folder_files import beside, files_by_name, refuse_repeated
from data.text import shown

Split = Literal["train", "test"]


class Layout(BaseModel):
    """A data set on disk. A subclass has a `kind`, a `tree` and methods that read it.

    Attributes:
        tree: the expected files below the root, for messages, one line for each path.
        root: the folder of the data set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tree: ClassVar[str]

    root: Path

    @field_serializer("root", when_used="json")
    def _as_text(self, root: Path) -> str:
        """The path; with bytes that are not UTF-8 escaped, which JSON cannot hold."""
        return str(root).encode("utf-8", "backslashreplace").decode()

    def path(self, *parts: str) -> Path:
        """The path of a file or folder below the root.

        Raises:
            DataError: it is missing; the message shows the tree.
        """
        path = self.root.joinpath(*parts)
        if not is_there(path):
            raise self.missing(f"there is no {path}{similar_path(path)}")
        return path

    def existing(self, path: Path) -> Path:
        """The path of a file that a list or another file's name leads to, as it is.

        Raises:
            DataError: it is missing; the message shows the tree.
        """
        if not is_there(path):
            raise self.missing(f"there is no {shown(path)}{similar_path(path)}")
        return path

    def glob(self, pattern: str, *parts: str) -> list[Path]:
        """The files in a folder below the root that match a pattern, sorted; `**/` recurses.

        Hidden files, and those that a system added, are left out.

        Raises:
            DataError: there are none; the message shows the tree.
        """
        folder = self.path(*parts)
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        paths = [path for path in found if not is_hidden(path.relative_to(folder).as_posix())]
        hidden = sorted(set(found) - set(paths))
        report_left_out(folder, [path.relative_to(folder).as_posix() for path in hidden])
        if not paths:
            raise self.missing(f"no {pattern} in {folder}")
        return paths

    def missing(self, what: str) -> DataError:
        """The error for files that are not there, with the tree."""
        return DataError(f"{what}; expected under {self.root}:\n{self.tree}")

    def images_in(self, folder: str, only: Collection[str] | None = None) -> dict[str, Path]:
        """The images in a folder below the root by their names without extension, sorted.

        Args:
            folder: below the root; folders in it are left out.
            only: the names that are used; None for all, which warns of files that are left out.

        Raises:
            DataError: there is no image, or two of those that are used have the same name; the
                message shows the tree.
        """
        where = self.path(folder)
        found, left_out = files_by_name(where, IMAGE_EXTENSIONS, only)
        if only is None:
            report_left_out(where, left_out)
        if not found and only is None:
            others = f"; there are {describe_left_out(left_out)}" if left_out else ""
            raise self.missing(f"no image ({IMAGES}) in {where}{others}")
        return found

    def paired(
        self,
        images: str,
        targets: str,
        what: str,
        extensions: Sequence[str] = ("png",),
        only: Sequence[str] | None = None,
    ) -> list[tuple[Path, Path]]:
        """The images of a folder, each with the file of the same name in another.

        Args:
            images: folder below the root.
            targets: likewise.
            what: the other files are, for messages: `label map`, `depth`, ...
            extensions: of the other files, in lower case.
            only: names of the images that are used, in their order, as a list of the set has them;
                None for all, which warns of files that have no partner.

        Raises:
            DataError: an image has no partner, or a listed one is missing or listed twice.
        """
        found = self.images_in(images, only)
        partners, left_out = files_by_name(self.path(targets), extensions, only)
        if only is None:
            unused = [path.name for name, path in partners.items() if name not in found]
            self._report_unused(targets, what, unused)
            others = [name for name in left_out if kind_of(name) != "hidden"]
            report_left_out(
                self.root / targets, others, f"{what} is read from {', '.join(extensions)}"
            )
        else:
            refuse_repeated(only, images)
            self._refuse_absent(images, only, found)
        names = list(found) if only is None else only
        alone = [name for name in names if name not in partners]
        if alone:
            hint = beside(alone[0], left_out) or did_you_mean(alone[0], partners)
            raise self.missing(
                f"{len(alone)} of {len(names)} images in {images} have no {what} "
                f"({', '.join(extensions)}){hint}; for '{shown(found[alone[0]].name)}' there is no "
                f"{shown(self.root / targets / alone[0])}.{extensions[0]}"
            )
        return [(found[name], partners[name]) for name in names]

    def _report_unused(self, targets: str, what: str, unused: list[str]) -> None:
        if unused:
            names = ", ".join(map(shown, unused[:3])) + (", ..." if len(unused) > 3 else "")
            warn_once(self.root / targets, f"{len(unused)} files ({what}) have no image: {names}")

    def _refuse_absent(self, images: str, only: Sequence[str], found: Mapping[str, Path]) -> None:
        absent = [name for name in only if name not in found]
        if absent:
            hint = similar_path(self.root / images / f"{absent[0]}.jpg")
            raise self.missing(
                f"{images} has no {shown(absent[0])}.jpg, which is in the list of the set "
                f"({len(absent)} of {len(only)} are missing){hint}"
            )


def is_there(path: Path) -> bool:
    """Whether a path exists; not if its name is longer than the file system allows."""
    try:
        return path.exists()
    except OSError:
        return False
