"""Progress of work that all ranks share: shown by rank 0."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from data.progress import track
from distill.runtime import distributed

_T = TypeVar("_T")


def tracked(items: Sequence[_T], what: str) -> Iterable[_T]:
    """The items; rank 0 shows a bar on a terminal and plain lines in a log, other ranks nothing.

    Args:
        items: of this rank; rank 0 stands for the others.
        what: names the work, as in "encoding".
    """
    return track(items, what) if distributed.rank() == 0 else items
