"""Images in a folder a class, and what the classes are called."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from pydantic import PositiveInt

from data.errors import DataError
from data.gather import ImageFiles, open_images
from data.labelled.files import read_lines
from data.labelled.layout import Layout, Split


class ClassImages(NamedTuple):
    """The images of a split.

    Attributes:
        names: of the images, class after class.
        labels: their classes, as places in `classes`.
        classes: the classes' folders, sorted.
        read: the bytes of an image by its name; may be called from several threads.
    """

    names: list[str]
    labels: list[int]
    classes: list[str]
    read: Callable[[str], bytes]


class ClassFolders(Layout):
    """ImageNet's form, and that of every `ImageFolder`; the same inside a zip or a plain tar.

    Attributes:
        root: the folder, or the archive.
        test: the folder of the split that is measured on.
        num_classes: how many, the first in the order of their folders' names; None for all.
        shots: images of each class to train on, the first by name; None for all.
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
            split: which.
            classes: those that labels count in, as of the other split; None for this one's own.

        Raises:
            DataError: there is no such folder, an image without a class, or of a class that
                is none of `classes`.
        """
        folder = "train" if split == "train" else self.test
        archive = self.root.is_file()
        source, prefix = (self.root, f"{folder}/") if archive else (self.place(folder), "")
        with open_images(source) as files:
            found = self._by_class(_whole(files, source), prefix, folder)
            known = sorted(found)[: self.num_classes] if classes is None else list(classes)
            unknown = sorted(found.keys() - set(known))
            if classes is not None and self.num_classes is None and unknown:
                raise DataError(
                    f"{self.root}: {folder} has a class that train has not, '{unknown[0]}'; "
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
                        f"{self.root}: '{name}' lies in {folder} itself, not in a class's folder; "
                        f"expected:\n{self.tree}"
                    )
                found.setdefault(label, []).append(name)
        if not found:
            raise DataError(
                f"no image in {folder} of {self.root}; expected under {self.root}:\n{self.tree}"
            )
        return found


def _whole(files: ImageFiles, source: Path) -> ImageFiles:
    for name, reason in files.damaged[:1]:
        raise DataError(f"'{source}', {name}: {reason}")
    return files


def read_class_names(path: Path, classes: Sequence[str]) -> list[str]:
    """What classes are called.

    Args:
        path: a table with tabs between its columns, whose header names them: the first has the
            classes' folders, another is `name`, with synonyms between commas, of which the first
            counts. Or plain lines, a name each, in the order of the folders' names.
        classes: the classes' folders.

    Raises:
        DataError: the file cannot be read, leaves a class out, or has another number of lines.
    """
    lines = read_lines(path)
    if lines and "\t" in lines[0]:
        return _from_table(path, lines, classes)
    if len(lines) != len(classes):
        raise DataError(
            f"'{path}' has {len(lines)} lines and the data {len(classes)} classes; a line a class "
            "is due, in the order of their folders' names, or a table that names the folders"
        )
    twice = [name for name, times in Counter(lines).items() if times > 1]
    if twice:
        raise DataError(f"'{path}' calls two classes '{twice[0]}'; no text can tell them apart")
    return lines


def _from_table(path: Path, lines: list[str], classes: Sequence[str]) -> list[str]:
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = list(rows[0]) if rows else lines[0].split("\t")
    if "name" not in columns:
        raise DataError(f"'{path}' has no column 'name'; it has {', '.join(columns)}")
    names = {row[columns[0]]: (row["name"] or "").split(",")[0].strip() for row in rows}
    missing = [name for name in classes if not names.get(name)]
    if missing:
        raise DataError(f"'{path}' has no name for the class '{missing[0]}'")
    return [names[name] for name in classes]
