"""What the training stream asks of its two modes."""

from collections.abc import Iterator
from typing import Any, Protocol

from data.batch import Batch
from data.errors import DataError

Position = dict[str, Any]


class Feed(Protocol):
    """A source of micro-batches with a position.

    Attributes:
        identity: JSON-able facts that decide order and content of the samples.
        num_samples: distinct samples; None where that is not known.
    """

    identity: dict[str, Any]
    num_samples: int | None

    def start(self) -> Position:
        """The position before the first step; JSON-able."""

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """Endless micro-batches of this rank from `position`, the start of a step.

        Yields:
            A micro-batch, or the error that ends the run; and the position behind it where it
            completes a step, else None.
        """
