"""The students that ship with this package, in the box `student/small/`, and the names they have.

A name stands wherever the path of a student's file does: `student.load("NAME")`.
"""

from os import PathLike
from pathlib import Path

from teachers.messages import took

SHIPPED = Path(__file__).parent / "small"
WEIGHTS = "student.safetensors"  # in the folder of each, as in a checkpoint


def names() -> list[str]:
    """The names of the students in the box, sorted."""
    return sorted(each.parent.name for each in SHIPPED.glob(f"*/{WEIGHTS}"))


def shipped(path: str | PathLike[str]) -> Path | None:
    """The folder of the student whose name a path is; None for any other path.

    What lies at the path itself is taken in its place, which is said: paths of before go on
    meaning what they did.
    """
    name = str(path)
    if name not in names():
        return None
    if Path(name).exists():
        took(f"student {name}", "the path", ["the path", "the student that ships"])
        return None
    return SHIPPED / name


def is_name(path: str | PathLike[str]) -> bool:
    """Whether a path could be a name: it has no folder and nothing lies there."""
    return Path(path).name == str(path) and not Path(path).exists()
