"""Images in one folder for each class, and the names of the classes."""

import csv
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from pydantic import PositiveInt

from data.errors import DataError
from data.gather import ImageFiles, open_images
from data.image_files import (
    IMAGES,
    PICTURES,
    describe_left_out,
    extension_of,
    is_hidden,
    warn_once,
)
from data.labelled.files import read_lines
from data.labelled.layout import Layout, Split
from data.text import shown


class ClassImages(NamedTuple):
    """The images of a split.

    Attributes:
        names: of the images, by class.
        labels: their classes, as indices of `classes`.
        classes: names of the classes' folders, sorted.
        read: returns the bytes of an image by its name; thread-safe.
    """

    names: list[str]
    labels: list[int]
    classes: list[str]
    read: Callable[[str], bytes]


class ClassFolders(Layout):
    """The layout of ImageNet and of torchvision's `ImageFolder`, also inside a zip or plain tar.

    Attributes:
        root: the folder or archive.
        test: the folder of the test split.
        num_classes: the number of classes that are used, the first by name; None for all.
        shots: the number of training images of each class, the first by name; None for all.
    """

    tree: ClassVar[str] = "  train/<class>/*.jpg\n  val/<class>/*.jpg"

    kind: Literal["class_folders"] = "class_folders"
    test: str = "val"
    num_classes: PositiveInt | None = None
    shots: PositiveInt | None = None

    @contextmanager
    def open(self, split: Split, classes: Sequence[str] | None = None) -> Iterator[ClassImages]:
        """Lists a split; its images can be read until the context ends.

        Args:
            split: train or test.
            classes: of the other split, which number the labels; None for this split's own.

        Raises:
            DataError: the folder is missing, or an image has no class or one not in `classes`.
        """
        folder = "train" if split == "train" else self.test
        archive = self.root.is_file()
        source, prefix = (self.root, f"{folder}/") if archive else (self.path(folder), "")
        with open_images(source) as files:
            found = self._by_class(files.readable(source), prefix, folder)
            known = sorted(found)[: self.num_classes] if classes is None else list(classes)
            if len(known) < (self.num_classes or 0) and classes is None:
                raise DataError(
                    f"num_classes: {self.num_classes}, but {folder} of {self.root} has "
                    f"{len(known)} classes"
                )
            unknown = sorted(found.keys() - set(known))
            if classes is not None and self.num_classes is None and unknown:
                raise DataError(
                    f"{self.root}: {folder} has a class that train lacks, '{unknown[0]}'; "
                    f"expected the same classes in both:\n{self.tree}"
                )
            shots = self.shots if split == "train" else None
            names, labels = [], []
            for label, name in enumerate(known):
                chosen = found.get(name, [])[:shots]
                names += chosen
                labels += [label] * len(chosen)
            yield ClassImages(names, labels, known, files.read)

    def _by_class(self, files: ImageFiles, prefix: str, folder: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in files.sizes:
            if name.startswith(prefix):
                label, slash, _ = name.removeprefix(prefix).partition("/")
                if not slash:
                    raise DataError(
                        f"{self.root}: '{shown(name)}' lies in {folder} itself, not in a class's "
                        f"folder; expected:\n{self.tree}"
                    )
                found.setdefault(label, []).append(name)
        others = [name for name in files.left_out if name.startswith(prefix)]
        if not found:
            beside = f"; there are {describe_left_out(others)}" if others else ""
            beside = beside or _deeper(files.sizes, folder)
            raise self.missing(f"no image in {folder} of {self.root} ({IMAGES}){beside}")
        self._refuse_unread_class(found, others, prefix, folder)
        return found

    def _refuse_unread_class(
        self, found: Collection[str], left_out: Sequence[str], prefix: str, folder: str
    ) -> None:
        """A class of which all pictures are left out would vanish, and others take its number."""
        pictures: dict[str, list[str]] = {}
        for name in left_out:
            label, slash, _ = name.removeprefix(prefix).partition("/")
            if slash and extension_of(name) in PICTURES and not is_hidden(name):
                pictures.setdefault(label, []).append(name)
        for label, names in sorted(pictures.items()):
            if label not in found:
                raise DataError(
                    f"{self.root}: {folder} has no image of the class '{shown(label)}' that is "
                    f"read ({IMAGES}), only {describe_left_out(names)}; convert them, as to PNG"
                )


def _deeper(names: Iterable[str], folder: str) -> str:
    """The hint where an archive holds the split's folder, but inside another folder."""
    inside = f"/{folder}/"
    outer = next((name.partition(inside)[0] for name in names if inside in name), None)
    if outer is None:
        return ""
    return f"; there is {shown(outer)}{inside}: unpack the archive, and give {shown(outer)} as root"


def read_class_names(path: Path, classes: Sequence[str]) -> list[str]:
    """The names of classes.

    Args:
        path: a table with tabs between its columns and a header: the first column has the classes'
            folders, the column `name` their names, comma-separated, of which the first counts. Or
            a plain list of names, in the sorted order of the folders.
        classes: the classes' folders.

    Raises:
        DataError: the file cannot be read, lacks a class or has it twice, or has another number of
            lines.
    """
    lines = read_lines(path)
    if lines and "\t" in lines[0]:
        return _from_table(path, lines, classes)
    if len(lines) != len(classes):
        raise DataError(
            f"'{path}' has {len(lines)} lines and the data {len(classes)} classes; expected one "
            "line for each class, in the sorted order of their folders, or a table with the folders"
        )
    _warn_of_shared(path, lines)
    return lines


def _warn_of_shared(path: Path, names: Sequence[str]) -> None:
    """No error: CLIP's own names of ImageNet have `missile` and `sunglasses` twice."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        some = ", ".join(shown(name, 40) for name in twice[:3]) + (", ..." if twice[3:] else "")
        warn_once(
            path,
            f"{len(twice)} names belong to several classes ({some}): nothing tells these apart",
        )


def _from_table(path: Path, lines: list[str], classes: Sequence[str]) -> list[str]:
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = list(rows[0]) if rows else lines[0].split("\t")
    if "name" not in columns:
        raise DataError(f"'{path}': expected a column 'name', got {', '.join(columns)}")
    names = {row[columns[0]]: (row["name"] or "").split(",")[0].strip() for row in rows}
    folders = Counter(row[columns[0]] for row in rows)
    twice = [name for name in classes if folders[name] > 1]
    if twice:
        raise DataError(f"'{path}' has two rows for the class '{shown(twice[0])}'")
    missing = [name for name in classes if not names.get(name)]
    if missing:
        raise DataError(f"'{path}' has no name for the class '{missing[0]}'")
    found = [names[name] for name in classes]
    _warn_of_shared(path, found)
    return found
