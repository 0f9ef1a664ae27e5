"""What the training stream asks of its two modes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from data.batch import Batch
from data.errors import DataError

Position = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """One rank's share of a global batch.

    Attributes:
        batch_size: samples in an optimiser step, over all ranks.
        micro_batch_size: samples in one forward pass of this rank.
        rank: of this process.
        world_size: number of processes.
    """

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank {self.rank} is not in range({self.world_size})")
        if min(self.batch_size, self.micro_batch_size) <= 0 or self.batch_size % self._round:
            raise DataError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} ranks"
            )

    @property
    def _round(self) -> int:
        return self.micro_batch_size * self.world_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this rank in a global batch."""
        return self.batch_size // self._round


class Feed(Protocol):
    """A source of micro-batches with a position.

    Attributes:
        identity: JSON-able facts that decide order and content of the samples.
        num_samples: distinct samples; None where that is not known.
    """

    identity: dict[str, Any]
    num_samples: int | None

    def start(self) -> Position:
        """The position before the first sample; JSON-able."""

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """Endless micro-batches of this rank from `position`, the start of a global batch.

        Yields:
            A micro-batch, or the error that ends the run; and the position behind it where it
            completes a global batch, else None.
        """
