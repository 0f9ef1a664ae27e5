"""The student that is trained and shipped: a ViT for any resolution, with a head for each teacher.

Importing this package imports `teachers` first, which repairs torchvision's operators where
needed, because the modules here import timm. Nothing here needs deepspeed or `distill`.
"""

from os import PathLike
from typing import TYPE_CHECKING

import teachers.features  # noqa: F401  must come before timm

if TYPE_CHECKING:
    from student.model import Student


def load(path: str | PathLike[str]) -> "Student":
    """Loads an exported student, in eval mode; see `student.storage.load_student`.

    Args:
        path: the name of one that ships, see `names`; its file; the folder of `--format hf`, of a
            checkpoint, or of a run that is done; or `hf://OWNER/NAME[@REVISION]` on Hugging Face's
            hub.
    """
    from student.storage import load_student

    return load_student(path)


def names() -> list[str]:
    """The names of the students that ship with this package, which `load` takes."""
    from student import shipped

    return shipped.names()
