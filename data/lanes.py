"""The stream over URLs, pipes and object stores, which can only be read from front to end.

Every source's shards are dealt, epoch by epoch, to a fixed number of lanes; each lane reads its
shards one behind the other and shuffles the samples a chunk at a time. Global batch k holds
batch_size / lanes samples of each lane, whoever reads it. A lane's state says where its chunk
begins and how much of it is used, so that resuming reads at most one shard and one chunk again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.batch import BadSample, Batch
from data.config import DataConfig
from data.decode import ImageReader
from data.errors import DataError
from data.feed import Position, Share
from data.lane_reader import LaneSource, StreamedSource
from data.loader import load_in_workers
from data.mixture import Mixture
from data.shards import unique_names
from data.tar_stream import check_url

_CHUNK_UNIT = 100  # samples of a lane for each unit of `DataConfig.shuffle_window`


class _Part(NamedTuple):
    """What one worker contributes to a global batch: rows of one sample a lane."""

    images: torch.Tensor
    keys: list[str]
    bad: list[BadSample]
    lanes: dict[str, list[list[int]]]


class _Parts(IterableDataset):
    """The parts of one worker; `lanes` are those of its rank, dealt to the rank's workers."""

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        mixture: Mixture,
        batch_size: int,
        lanes: Sequence[int],
        position: Position,
    ) -> None:
        self._sources = sources
        self._mixture = mixture
        self._batch_size = batch_size
        self._lanes = lanes
        self._position = position

    def __iter__(self) -> Iterator[_Part | DataError]:
        """Endless; an error comes as a value and ends it."""
        worker = get_worker_info()
        mine = self._lanes[worker.id :: worker.num_workers] if worker else self._lanes
        readers = {
            lane: [
                LaneSource(source, lane, state)
                for source, state in zip(
                    self._sources, self._position["lanes"][str(lane)], strict=True
                )
            ]
            for lane in mine
        }
        samples = self._position["samples"]
        while True:
            try:
                yield self._read(readers, samples)
            except DataError as error:
                yield error
                return
            samples += self._batch_size

    def _read(self, readers: dict[int, list[LaneSource]], first: int) -> _Part:
        lanes = self._sources[0].lanes
        keys: list[str] = []
        bad: list[BadSample] = []
        num = self._batch_size // lanes * len(readers)
        images = torch.empty((num, 3, *self._sources[0].images.resolution), dtype=torch.uint8)
        pixels = images.numpy()
        for row in range(first, first + self._batch_size, lanes):
            for lane, sources in readers.items():
                source = self._mixture.locate(row + lane)[0]
                key, sample = sources[source].read(bad)
                pixels[len(keys)] = sample.transpose(2, 0, 1)
                keys.append(key)
        states = {str(lane): [s.state() for s in sources] for lane, sources in readers.items()}
        return _Part(images, keys, bad, states)


class LaneFeed:
    """Reads shards behind URLs, and local ones beside them; see `data.feed.Feed`.

    A worker holds one chunk of undecoded images for each of its lanes and sources.

    Args:
        config: what to read.
        shards: paths and URLs of each source.
        images: decodes.
        share: of the global batch that this rank reads.
        seed: of the run.

    Raises:
        DataError: lanes that cannot be shared out, or a URL that nothing opens.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[Sequence[str]],
        images: ImageReader,
        share: Share,
        *,
        seed: int,
    ) -> None:
        _check_lanes(config, share, [len(urls) for urls in shards])
        everything = [url for urls in shards for url in urls]
        for url in everything:
            check_url(url)
        names = iter(_names(everything))
        self._sources = [
            StreamedSource(
                number=number,
                urls=tuple(urls),
                names=tuple(next(names) for _ in urls),
                lanes=config.lanes,
                chunk=config.shuffle_window * _CHUNK_UNIT,
                seed=seed,
                allow_pipe=config.allow_pipe,
                images=images,
            )
            for number, urls in enumerate(shards)
        ]
        self.identity: dict[str, Any] = {
            "lanes": config.lanes,
            "shuffle_window": config.shuffle_window,
        }
        for source in self._sources:
            digest = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
            self.identity[f"sources[{source.number}]"] = f"{len(source.names)} shards, {digest}"
        self.num_samples: int | None = None
        self._mixture = Mixture([source.weight for source in config.sources], seed)
        self._config = config
        self._share = share

    def start(self) -> Position:
        """See `Feed`."""
        zeros = [[0, 0, 0, 0] for _ in self._sources]
        return {"samples": 0, "lanes": {str(lane): zeros for lane in range(self._config.lanes)}}

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """See `Feed`."""
        share = self._share
        mine = range(share.rank, self._config.lanes, share.world_size)
        missing = [lane for lane in mine if str(lane) not in position["lanes"]]
        if missing:
            raise DataError(
                f"the stored position lacks lane {missing[0]}; store what merge_states makes of "
                "the states of all ranks"
            )
        dataset = _Parts(self._sources, self._mixture, share.batch_size, mine, position)
        loaded = load_in_workers(dataset, self._config)
        samples = position["samples"]
        while True:
            parts = []
            for _ in range(max(self._config.workers, 1)):
                parts.append(next(loaded))
                if isinstance(parts[-1], DataError):
                    yield parts[-1], None
                    return
            samples += share.batch_size
            lanes = {lane: state for part in parts for lane, state in part.lanes.items()}
            yield from _cut(parts, share, {"samples": samples, "lanes": lanes})


def _cut(
    parts: Sequence[_Part], share: Share, behind: Position
) -> Iterator[tuple[Batch, Position | None]]:
    """The rank's micro-batches, in an order of samples that does not depend on the workers."""
    images = torch.stack([part.images for part in parts], dim=1).flatten(0, 1)
    keys = [key for row in zip(*(part.keys for part in parts), strict=True) for key in row]
    bad = tuple(sample for part in parts for sample in part.bad)
    size = share.micro_batch_size
    for number in range(share.micro_batches):
        last = number == share.micro_batches - 1
        place = slice(number * size, (number + 1) * size)
        batch = Batch(images[place], keys[place], bad if last else ())
        yield batch, behind if last else None


def _names(urls: Sequence[str]) -> list[str]:
    """Names without queries, which hold signatures that change, where they tell shards apart."""
    plain = [url.partition("?")[0] if "://" in url else url for url in urls]
    return unique_names(plain if len(set(plain)) == len(set(urls)) else urls)


def _check_lanes(config: DataConfig, share: Share, shards: Sequence[int]) -> None:
    readers, lanes = share.world_size * max(config.workers, 1), config.lanes
    most = min(shards)
    if lanes % readers == 0 and share.batch_size % lanes == 0 and lanes <= most:
        return
    fitting = [n for n in range(readers, most + 1, readers) if share.batch_size % n == 0]
    fitting.sort(key=lambda n: abs(n - lanes))
    advice = f"use {', '.join(map(str, sorted(fitting[:3])))}"
    if not fitting:
        advice = "no number fits: use fewer workers, more shards or another batch_size"
    raise DataError(
        f"data.lanes={lanes} must be a multiple of {share.world_size} ranks x "
        f"{max(config.workers, 1)} workers, divide batch_size {share.batch_size} and be at most "
        f"{most}, the shards of the smallest source; {advice}"
    )
