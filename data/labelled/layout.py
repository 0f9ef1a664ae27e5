"""The base of data sets on disk, whose error messages show the expected tree."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from data.errors import DataError

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

    def path(self, *parts: str) -> Path:
        """The path of a file or folder below the root.

        Raises:
            DataError: it is missing; the message shows the tree.
        """
        path = self.root.joinpath(*parts)
        if not path.exists():
            raise DataError(f"there is no {path}; expected under {self.root}:\n{self.tree}")
        return path

    def glob(self, pattern: str, *parts: str) -> list[Path]:
        """The files in a folder below the root that match a pattern, sorted; `**/` recurses.

        Raises:
            DataError: there are none; the message shows the tree.
        """
        folder = self.path(*parts)
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not paths:
            raise DataError(f"no {pattern} in {folder}; expected under {self.root}:\n{self.tree}")
        return paths

    def image_files(self, folder: str) -> list[Path]:
        """The JPEG and PNG images in a folder below the root, sorted.

        Raises:
            DataError: there are none; the message shows the tree.
        """
        found = sorted([*self.path(folder).glob("*.jpg"), *self.path(folder).glob("*.png")])
        return found or self.glob("*.jpg", folder)
