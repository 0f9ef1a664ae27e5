"""A data set on disk: where it lies, and a message with the expected tree where it does not."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from data.errors import DataError

Split = Literal["train", "test"]


class Layout(BaseModel):
    """Where a set lies. A subclass has a `kind`, its tree, and what it reads.

    Attributes:
        root: the folder that `tree` starts at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tree: ClassVar[str]  # for messages, a line a path

    root: Path

    def place(self, *parts: str) -> Path:
        """A file or folder below the root.

        Raises:
            DataError: it is not there; shows the tree.
        """
        path = self.root.joinpath(*parts)
        if not path.exists():
            raise DataError(f"there is no {path}; expected under {self.root}:\n{self.tree}")
        return path

    def found(self, pattern: str, *parts: str) -> list[Path]:
        """The files below a folder that match a pattern, sorted; `**/` looks in folders too.

        Raises:
            DataError: there are none; shows the tree.
        """
        folder = self.place(*parts)
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not paths:
            raise DataError(f"no {pattern} in {folder}; expected under {self.root}:\n{self.tree}")
        return paths
