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

        Yields:
            A micro-batch, or the error that ends the run; and, where the micro-batch completes a
            step, the position after it, else None.
        """
