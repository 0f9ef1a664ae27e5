"""What every optimiser step reads: how many images of which size, and who reads them.

A pure function of the step's number, so that a worker decodes straight to the size that is due,
and a resumed run needs to know only where it stood.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one step that are read alike, one behind the other in the global order.

    Attributes:
        resolution: (H, W) of the images.
        batch_size: samples, over all ranks that share them.
        micro_batch_size: samples of one forward pass of one rank.
        ranks: those that share the part; each takes every `len(ranks)`-th micro-batch.
        lanes: where the part's lanes begin and end, as shares of all lanes; streaming mode only.
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
        """Micro-batches of each of its ranks."""
        return self.batch_size // self._round

    def lanes_of(self, num_lanes: int) -> range:
        """Its lanes among `num_lanes`."""
        first, last = (share * num_lanes for share in self.lanes)
        return range(-(-first.numerator // first.denominator), int(last))


class Slice(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        first: place of its first sample in the global order.
        size: samples, in consecutive places.
        resolution: (H, W) of its images.
    """

    first: int
    size: int
    resolution: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The parts of every step.

    Attributes:
        parts: of optimiser step number k, in the global order of their samples.
        all: each part that any step may have, which is what is checked before a run.
        identity: JSON-able facts that decide how many samples of which size a step reads; no
            number of ranks and no size of micro-batches.
    """

    parts: Callable[[int], Sequence[Part]]
    all: Sequence[Part]
    identity: Mapping[str, Any]

    def num_samples(self, step: int) -> int:
        """Samples of a step, over all ranks."""
        return sum(part.batch_size for part in self.parts(step))

    def slices(self, rank: int, step: int, first: int) -> Iterator[Slice]:
        """A rank's micro-batches of a step.

        Args:
            rank: of the process.
            step: number of the optimiser step.
            first: place of the step's first sample.
        """
        for part in self.parts(step):
            if rank in part.ranks:
                size, ranks = part.micro_batch_size, len(part.ranks)
                start = first + part.ranks.index(rank) * size
                for number in range(part.micro_batches):
                    yield Slice(start + number * ranks * size, size, part.resolution)
            first += part.batch_size


def fixed_layout(
    *, resolution: tuple[int, int], batch_size: int, micro_batch_size: int, ranks: int = 1
) -> Layout:
    """The same in every step: one size, shared by all ranks.

    Args:
        resolution: (H, W).
        batch_size: samples of a step, over all ranks.
        micro_batch_size: samples of one forward pass of one rank.
        ranks: number of processes.

    Raises:
        DataError: the batch cannot be shared out.
    """
    part = Part(
        resolution=resolution,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        ranks=range(ranks),
    )
    identity = {"resolution": list(resolution), "batch_size": batch_size}
    return Layout(lambda step: [part], [part], identity)
