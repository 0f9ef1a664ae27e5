"""The stream over local shards: an index, a plan, and one integer of state."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.bad import log_bad
from data.batch import Batch
from data.config import DataConfig
from data.decode import ImageReader
from data.errors import DataError
from data.feed import Position, Share
from data.index import load_index
from data.loader import Count, load_in_workers
from data.mixture import Mixture
from data.plan import SourcePlan
from data.reader import IndexedSource, MicroBatches
from data.shards import unique_names


class IndexedFeed:
    """Reads local shards by position; see `data.feed.Feed`.

    Args:
        config: what to read.
        shards: paths of each source.
        images: decodes.
        share: of the global batch that this rank reads.
        seed: of the run.
        index_dir: a cache for the index, or None.

    Raises:
        DataError: a source without images, or with too many bad samples.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[Sequence[str]],
        images: ImageReader,
        share: Share,
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
            if share.rank == 0:  # every rank has the same index
                log_bad(index.bad, len(index) + len(index.bad))
            plan = SourcePlan(index.counts, window=config.shuffle_window, seed=seed, source=number)
            sources.append(IndexedSource(index, plan, images, seed))
            self.identity[f"sources[{number}]"] = f"{len(index)} samples, {index.digest}"
        self.num_samples: int | None = sum(source.num_samples for source in sources)
        mixture = Mixture([source.weight for source in config.sources], seed)
        self._dataset = MicroBatches(sources, mixture, share.micro_batch_size, images.resolution)
        self._config = config
        self._share = share

    def start(self) -> Position:
        """See `Feed`."""
        return {"samples": 0}

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """See `Feed`."""
        share, samples = self._share, position["samples"]
        first = samples // share.micro_batch_size + share.rank
        numbers = Count(first, share.world_size)
        loaded = load_in_workers(self._dataset, self._config, numbers)
        while True:
            for number in range(share.micro_batches):
                batch = next(loaded)
                if number == share.micro_batches - 1:
                    samples += share.batch_size
                    yield batch, {"samples": samples}
                else:
                    yield batch, None
