"""The layout of an optimiser step: how many images of which size it reads, and on which ranks.

It is a pure function of the step number. So workers decode directly to the size of a later step,
and a resumed run needs only its position.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SubBatch:
    """Samples of one step with one size and the same ranks, consecutive in the global order.

    Attributes:
        resolution: (H, W) of the images in pixels.
        batch_size: samples, over all ranks that share them.
        micro_batch_size: samples of one forward pass of one rank.
        ranks: those that share the samples; each takes every `len(ranks)`-th micro-batch.
        lanes: first and last lane, as fractions of the number of lanes; streaming mode only.
    """

    resolution: tuple[int, int]
    batch_size: int
    micro_batch_size: int
    ranks: range = range(1)
    lanes: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))

    def __post_init__(self) -> None:
        if min(self.batch_size, self.micro_batch_size) <= 0 or self.batch_size % self._round:
            raise DataError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {len(self.ranks)} ranks"
            )

    @property
    def _round(self) -> int:
        return self.micro_batch_size * len(self.ranks)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return self.batch_size // self._round

    def lanes_of(self, num_lanes: int) -> range:
        """The lanes that it reads, of `num_lanes`."""
        first, last = (share * num_lanes for share in self.lanes)
        return range(-(-first.numerator // first.denominator), int(last))


class Slice(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        first: position of the first sample in the global order.
        size: number of samples, at consecutive positions.
        resolution: (H, W) of the images in pixels.
    """

    first: int
    size: int
    resolution: tuple[int, int]


@dataclass(frozen=True)
class StepLayout:
    """The sub-batches of every step.

    Attributes:
        sub_batches: step number to its sub-batches, in the global order of their samples.
        all: every sub-batch that a step can have; they are checked before a run.
        identity: JSON-able facts that decide how many samples of which size a step reads. The
            number of ranks and the micro-batch sizes are not among them.
    """

    sub_batches: Callable[[int], Sequence[SubBatch]]
    all: Sequence[SubBatch]
    identity: Mapping[str, Any]

    def num_samples(self, step: int) -> int:
        """Samples of a step, over all ranks."""
        return sum(sub.batch_size for sub in self.sub_batches(step))

    def slices(self, rank: int, step: int, first: int) -> Iterator[Slice]:
        """A rank's micro-batches of a step, whose first sample has the global position `first`."""
        for sub in self.sub_batches(step):
            if rank in sub.ranks:
                size, ranks = sub.micro_batch_size, len(sub.ranks)
                start = first + sub.ranks.index(rank) * size
                for number in range(sub.micro_batches):
                    yield Slice(start + number * ranks * size, size, sub.resolution)
            first += sub.batch_size


def fixed_layout(
    *, resolution: tuple[int, int], batch_size: int, micro_batch_size: int, ranks: int = 1
) -> StepLayout:
    """A layout that is the same in every step: one size, see `SubBatch`, shared by all ranks.

    Raises:
        DataError: the batch size is not a multiple of micro-batch size x ranks.
    """
    sub = SubBatch(
        resolution=resolution,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        ranks=range(ranks),
    )
    identity = {"resolution": list(resolution), "batch_size": batch_size}
    return StepLayout(lambda step: [sub], [sub], identity)
