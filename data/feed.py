"""The interface of the two modes of the training stream: indexed and in lanes."""

from collections.abc import Iterator
from typing import Any, Protocol

from data.batch import Batch
from data.errors import DataError

Position = dict[str, Any]


class Feed(Protocol):
    """A source of micro-batches with a position.

    Attributes:
        identity: JSON-able facts that decide the order and the content of the samples.
        num_samples: distinct samples; None where the number is unknown.
    """

    identity: dict[str, Any]
    num_samples: int | None

    def start(self) -> Position:
        """The position before the first step; JSON-able."""

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """Micro-batches of this rank from `position`, the start of a step, without end.

        An error that ends the run is yielded in place of a micro-batch. With each comes the
        position after its step where it completes one, else None.
        """
