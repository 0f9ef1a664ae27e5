"""The order of one source's samples, a pure function of seed and epoch, made window by window."""

from typing import NamedTuple

import numpy as np

from data.seeds import Purpose, permutation

_KEPT = 4  # windows in memory; a batch rarely needs more than two


class Place(NamedTuple):
    """The place of one sample in the plan.

    Attributes:
        epoch: of the source, from 0.
        window: int64, the sample numbers of its window, in the order in which they are read.
        slot: position of the sample in `window`.
    """

    epoch: int
    window: np.ndarray
    slot: int


class SourcePlan:
    """Endless epochs over one source, each with every sample exactly once.

    An epoch permutes the shards, cuts them into windows of `window` shards and permutes the samples
    in each, so that only a window is in memory and reads stay in few files.

    Args:
        counts: int64 (S,), samples in each shard; samples are numbered through the shards in order.
        window: shards in a window.
        seed: of the run.
        source: number of the source in its mixture.
    """

    def __init__(self, counts: np.ndarray, *, window: int, seed: int, source: int) -> None:
        self.num_samples = int(counts.sum())
        self._counts = counts
        self._first = np.cumsum(counts) - counts
        self._window = window
        self._seed = (seed, source)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self._recent: dict[tuple[int, int], np.ndarray] = {}

    def locate(self, ordinal: int) -> Place:
        """The place of the source's `ordinal`-th sample since the start of training."""
        epoch, offset = divmod(ordinal, self.num_samples)
        starts = self._epoch(epoch)[1]
        number = int(np.searchsorted(starts, offset, side="right")) - 1
        return Place(epoch, self._samples(epoch, number), offset - int(starts[number]))

    def _samples(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) not in self._recent:
            if len(self._recent) == _KEPT:
                del self._recent[next(iter(self._recent))]
            self._recent[epoch, number] = self._shuffle(epoch, number)
        return self._recent[epoch, number]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards, and the position in the epoch where each window starts."""
        if self._order is None or self._order[0] != epoch:
            seed, source = self._seed
            shards = permutation(len(self._counts), seed, Purpose.SHARDS, source, epoch)
            before = np.cumsum(self._counts[shards]) - self._counts[shards]
            self._order = epoch, shards, before[:: self._window]
        return self._order[1:]

    def _shuffle(self, epoch: int, number: int) -> np.ndarray:
        seed, source = self._seed
        chosen = self._epoch(epoch)[0][number * self._window : (number + 1) * self._window]
        samples = np.concatenate(
            [np.arange(self._first[s], self._first[s] + self._counts[s]) for s in chosen]
        )
        return samples[permutation(len(samples), seed, Purpose.WINDOW, source, epoch, number)]
