"""The stream over URLs, pipes and object stores, which can only be read from front to end.

Every source's shards are dealt, epoch by epoch, to a fixed number of lanes; each lane reads its
shards one behind the other and shuffles the samples a chunk at a time. A step's part holds
batch_size / lanes samples of each of its lanes, whoever reads it. A lane's state says where its
chunk begins and how much of it is used, so that resuming reads at most one shard and one chunk
again.
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
from data.feed import Position
from data.lane_reader import LaneSource, StreamedSource
from data.layout import Layout, Part
from data.loader import load_in_workers
from data.mixture import Mixture
from data.shards import unique_names
from data.tar_stream import check_url

_CHUNK_UNIT = 100  # samples of a lane for each unit of `DataConfig.shuffle_window`


class _Rows(NamedTuple):
    """What one worker reads of a step's part: rows of one sample a lane."""

    images: torch.Tensor
    keys: list[str]


class _Step(NamedTuple):
    """What one worker contributes to a step: its rows of each part that its rank has."""

    rows: list[_Rows]
    bad: list[BadSample]
    lanes: dict[str, list[list[int]]]


class _Steps(IterableDataset):
    """The steps of one worker; of its rank's lanes of a part, every so-many-th is its own."""

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        mixture: Mixture,
        layout: Layout,
        rank: int,
        position: Position,
    ) -> None:
        self._sources, self._mixture = sources, mixture
        self._layout, self._rank, self._position = layout, rank, position

    def __iter__(self) -> Iterator[_Step | DataError]:
        """Endless; an error comes as a value and ends it."""
        step, samples = self._position["step"], self._position["samples"]
        readers: dict[int, list[LaneSource]] = {}
        while True:
            try:
                yield self._read(readers, step, samples)
            except DataError as error:
                yield error
                return
            samples += self._layout.num_samples(step)
            step += 1

    def _read(self, readers: dict[int, list[LaneSource]], step: int, first: int) -> _Step:
        rows: list[_Rows] = []
        bad: list[BadSample] = []
        for part in self._layout.parts(step):
            if self._rank in part.ranks:
                rows.append(self._rows(part, readers, first, bad))
            first += part.batch_size
        states = {str(lane): [s.state() for s in sources] for lane, sources in readers.items()}
        return _Step(rows, bad, states)

    def _rows(
        self, part: Part, readers: dict[int, list[LaneSource]], first: int, bad: list[BadSample]
    ) -> _Rows:
        worker = get_worker_info()
        every, own = (worker.num_workers, worker.id) if worker else (1, 0)
        lanes = part.lanes_of(self._sources[0].lanes)
        mine = _lanes_of_rank(part, lanes, self._rank)[own::every]
        keys: list[str] = []
        num = part.batch_size // len(lanes) * len(mine)
        images = torch.empty((num, 3, *part.resolution), dtype=torch.uint8)
        pixels = images.numpy()
        for row in range(first, first + part.batch_size, len(lanes)):
            for lane in mine:
                source = self._mixture.locate(row + lane - lanes.start)[0]
                reader = self._reader(readers, lane)[source]
                key, sample = reader.read(part.resolution, bad)
                pixels[len(keys)] = sample.transpose(2, 0, 1)
                keys.append(key)
        return _Rows(images, keys)

    def _reader(self, readers: dict[int, list[LaneSource]], lane: int) -> list[LaneSource]:
        if lane not in readers:
            states = self._position["lanes"][str(lane)]
            readers[lane] = [
                LaneSource(source, lane, state)
                for source, state in zip(self._sources, states, strict=True)
            ]
        return readers[lane]


class LaneFeed:
    """Reads shards behind URLs, and local ones beside them; see `data.feed.Feed`.

    A worker holds one chunk of undecoded images for each of its lanes and sources.

    Args:
        config: what to read.
        shards: paths and URLs of each source.
        images: decodes.
        layout: of every step.
        rank: of this process.
        seed: of the run.

    Raises:
        DataError: lanes that cannot be shared out, or a URL that nothing opens.
    """

    def __init__(
        self,
        config: DataConfig,
        shards: Sequence[Sequence[str]],
        images: ImageReader,
        layout: Layout,
        rank: int,
        *,
        seed: int,
    ) -> None:
        for part in layout.all:
            _check_lanes(config, part, [len(urls) for urls in shards])
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
        self._layout, self._rank = layout, rank

    def start(self) -> Position:
        """See `Feed`."""
        zeros = [[0, 0, 0, 0] for _ in self._sources]
        lanes = {str(lane): zeros for lane in range(self._config.lanes)}
        return {"step": 0, "samples": 0, "lanes": lanes}

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """See `Feed`."""
        layout, config = self._layout, self._config
        self._require_lanes(position)
        dataset = _Steps(self._sources, self._mixture, layout, self._rank, position)
        loaded = load_in_workers(dataset, config)
        step, samples = position["step"], position["samples"]
        while True:
            read = []
            for _ in range(max(config.workers, 1)):
                read.append(next(loaded))
                if isinstance(read[-1], DataError):
                    yield read[-1], None
                    return
            mine = [part for part in layout.parts(step) if self._rank in part.ranks]
            step, samples = step + 1, samples + layout.num_samples(step)
            lanes = {lane: state for each in read for lane, state in each.lanes.items()}
            yield from _cut(read, mine, {"step": step, "samples": samples, "lanes": lanes})

    def _require_lanes(self, position: Position) -> None:
        for part in self._layout.parts(position["step"]):
            lanes = part.lanes_of(self._config.lanes)
            for lane in _lanes_of_rank(part, lanes, self._rank):
                if str(lane) not in position["lanes"]:
                    raise DataError(
                        f"the stored position lacks lane {lane}; store what merge_states makes of "
                        "the states of all ranks"
                    )


def _lanes_of_rank(part: Part, lanes: range, rank: int) -> range:
    own = part.ranks.index(rank) if rank in part.ranks else len(lanes)
    return lanes[own :: len(part.ranks)]


def _cut(
    read: Sequence[_Step], parts: Sequence[Part], behind: Position
) -> Iterator[tuple[Batch, Position | None]]:
    """The rank's micro-batches, in an order of samples that does not depend on the workers."""
    bad = tuple(sample for each in read for sample in each.bad)
    for index, part in enumerate(parts):
        rows = [each.rows[index] for each in read]
        images = torch.stack([each.images for each in rows], dim=1).flatten(0, 1)
        keys = [key for row in zip(*(each.keys for each in rows), strict=True) for key in row]
        for number in range(part.micro_batches):
            last = index == len(parts) - 1 and number == part.micro_batches - 1
            place = slice(number * part.micro_batch_size, (number + 1) * part.micro_batch_size)
            batch = Batch(images[place], keys[place], bad if last else ())
            yield batch, behind if last else None


def _names(urls: Sequence[str]) -> list[str]:
    """Names without queries, which hold signatures that change, where they tell shards apart."""
    plain = [url.partition("?")[0] if "://" in url else url for url in urls]
    return unique_names(plain if len(set(plain)) == len(set(urls)) else urls)


def _check_lanes(config: DataConfig, part: Part, shards: Sequence[int]) -> None:
    readers, lanes = len(part.ranks) * max(config.workers, 1), config.lanes
    most, share = min(shards), part.lanes[1] - part.lanes[0]

    def fits(num: int) -> bool:
        mine = share * num
        whole = mine > 0 and mine.denominator == 1 and (part.lanes[0] * num).denominator == 1
        return whole and mine % readers == 0 and part.batch_size % mine == 0

    if fits(lanes) and lanes <= most:
        return
    fitting = [num for num in range(1, most + 1) if fits(num)]
    fitting.sort(key=lambda num: abs(num - lanes))
    advice = f"use {', '.join(map(str, sorted(fitting[:3])))}"
    if not fitting:
        advice = "no number fits: use fewer workers, more shards or another batch_size"
    shared = "" if share == 1 else f", of which {share} are read by one part of a step,"
    raise DataError(
        f"data.lanes={lanes}{shared} must be a multiple of {len(part.ranks)} ranks x "
        f"{max(config.workers, 1)} workers, divide batch_size {part.batch_size} and be at most "
        f"{most}, the shards of the smallest source; {advice}"
    )
