"""The training stream over local shards: an index, a plan, and two integers as its state."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from data.bad import log_bad
from data.batch import Batch
from data.config import DataConfig
from data.decode import ImageReader
from data.errors import DataError
from data.feed import Position, load_in_workers
from data.index import load_index
from data.layout import Slice, StepLayout
from data.mixture import Mixture
from data.plan import SourcePlan
from data.reader import IndexedSource, MicroBatches
from data.shards import unique_names


class _Slices(Sampler[Slice]):
    """The micro-batches of a rank from a step on, without end."""

    def __init__(self, layout: StepLayout, rank: int, step: int, first: int) -> None:
        self._layout, self._rank = layout, rank
        self._step, self._first = step, first

    def __iter__(self) -> Iterator[Slice]:
        step, first = self._step, self._first
        while True:
            yield from self._layout.slices(self._rank, step, first)
            first += self._layout.num_samples(step)
            step += 1


class IndexedFeed:
    """Reads local shards by position; see `data.feed.Feed`.

    Args:
        config: what to read.
        shards: paths of each source.
        images: decoder of the images.
        layout: of every step.
        rank: of this process.
        seed: of the run.
        index_dir: where the index is cached; None keeps it in memory.

    Raises:
        DataError: a source has no images, or too many bad samples.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[Sequence[str]],
        images: ImageReader,
        layout: StepLayout,
        rank: int,
        *,
        seed: int,
        index_dir: Path | None,
    ) -> None:
        names = iter(unique_names([path for paths in shards for path in paths]))
        sources = []
        self.identity: dict[str, Any] = {"shuffle_window": config.shuffle_window}
        for number, paths in enumerate(shards):
            index = load_index(
                paths,
                [next(names) for _ in paths],
                max_bad_share=config.max_bad_share,
                verify_checksums=config.verify_checksums,
                directory=index_dir,
            )
            if rank == 0:  # every rank has the same index
                log_bad(index.bad, len(index) + len(index.bad))
            plan = SourcePlan(index.counts, window=config.shuffle_window, seed=seed, source=number)
            sources.append(IndexedSource(index, plan, images, seed, config.sources[number].crops))
            self.identity[f"sources[{number}]"] = f"{len(index)} samples, {index.digest}"
        self._counts = [source.num_samples for source in sources]
        self.num_samples: int | None = sum(self._counts)
        self._mixture = Mixture([source.weight for source in config.sources], seed)
        self._dataset = MicroBatches(sources, self._mixture)
        self._config = config
        self._layout, self._rank = layout, rank

    def steps_of(self, epochs: Sequence[int]) -> int | None:
        """See `Feed`."""
        if len({sub.resolution for sub in self._layout.all}) > 1:
            return None
        wanted = [times * num for times, num in zip(epochs, self._counts, strict=True)]
        left = self._mixture.positions_for(wanted)
        steps = 0
        while left > 0:
            left -= self._layout.num_samples(steps)
            steps += 1
        return steps

    def start(self) -> Position:
        """See `Feed`."""
        return {"step": 0, "samples": 0}

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """See `Feed`."""
        layout, step, samples = self._layout, position["step"], position["samples"]
        slices = _Slices(layout, self._rank, step, samples)
        loaded = load_in_workers(self._dataset, self._config, slices)
        while True:
            num = sum(1 for _ in layout.slices(self._rank, step, samples))
            step, samples = step + 1, samples + layout.num_samples(step)
            for number in range(num):
                after = {"step": step, "samples": samples} if number == num - 1 else None
                yield next(loaded), after
