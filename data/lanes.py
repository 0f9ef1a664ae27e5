"""The training stream over URLs, pipes and object stores, which are read sequentially.

In every epoch the shards of each source are distributed over a fixed number of lanes. A lane reads
its shards one after the other and shuffles the samples in chunks. A sub-batch holds
batch_size / lanes samples of each of its lanes, on any number of ranks and workers. The state of a
lane is the start of its chunk and the number of samples used of it, so that resuming reads at most
one shard and one chunk again.
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
from data.feed import Position, load_in_workers
from data.lane_reader import LaneSource, StreamedSource
from data.layout import StepLayout, SubBatch
from data.mixture import Mixture
from data.shards import unique_names
from data.tar_stream import check_url

_CHUNK_UNIT = 100  # samples of a chunk for each unit of `DataConfig.shuffle_window`


class _Rows(NamedTuple):
    """The samples that one worker reads of a sub-batch: rows with one sample of each lane."""

    images: torch.Tensor
    keys: list[str]


class _Step(NamedTuple):
    """The samples that one worker reads of a step: rows of each sub-batch of its rank."""

    rows: list[_Rows]
    bad: list[BadSample]
    lanes: dict[str, list[list[int]]]


class _Steps(IterableDataset):
    """The steps of one worker, which reads every `num_workers`-th lane of its rank."""

    def __init__(
        self,
        sources: Sequence[StreamedSource],
        mixture: Mixture,
        layout: StepLayout,
        rank: int,
        position: Position,
    ) -> None:
        self._sources, self._mixture = sources, mixture
        self._layout, self._rank, self._position = layout, rank, position

    def __iter__(self) -> Iterator[_Step | DataError]:
        """Yields steps without end; an error is yielded as a value and ends the iteration."""
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
        for sub in self._layout.sub_batches(step):
            if self._rank in sub.ranks:
                rows.append(self._rows(sub, readers, first, bad))
            first += sub.batch_size
        states = {str(lane): [s.state() for s in sources] for lane, sources in readers.items()}
        return _Step(rows, bad, states)

    def _rows(
        self, sub: SubBatch, readers: dict[int, list[LaneSource]], first: int, bad: list[BadSample]
    ) -> _Rows:
        worker = get_worker_info()
        every, own = (worker.num_workers, worker.id) if worker else (1, 0)
        lanes = sub.lanes_of(self._sources[0].lanes)
        mine = _lanes_of_rank(sub, lanes, self._rank)[own::every]
        keys: list[str] = []
        num = sub.batch_size // len(lanes) * len(mine)
        images = torch.empty((num, 3, *sub.resolution), dtype=torch.uint8)
        pixels = images.numpy()
        for row in range(first, first + sub.batch_size, len(lanes)):
            for lane in mine:
                source = self._mixture.locate(row + lane - lanes.start)[0]
                reader = self._reader(readers, lane)[source]
                key, sample = reader.read(sub.resolution, bad)
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
    """Reads shards at URLs, and local ones beside them; see `data.feed.Feed`.

    A worker holds one chunk of undecoded images for each of its lanes and sources in memory.

    Args:
        config: what to read.
        shards: paths and URLs of each source.
        images: decoder of the images.
        layout: of every step.
        rank: of this process.
        seed: of the run.

    Raises:
        DataError: the number of lanes does not fit ranks, workers, batch size or shards, or a URL
            has an unknown scheme.
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
    ) -> None:
        everything = [url for urls in shards for url in urls]
        for url in everything:  # before the lanes: what cannot be opened needs no lanes
            check_url(url)
        for sub in layout.all:
            _check_lanes(config, sub, [len(urls) for urls in shards])
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
                crops=config.sources[number].crops,
            )
            for number, urls in enumerate(shards)
        ]
        self.identity: dict[str, Any] = {
            "lanes": config.lanes,
            "shuffle_window": config.shuffle_window,
        }
        for source in self._sources:
            digest = hashlib.sha256(
                "\n".join(source.names).encode("utf-8", "surrogatepass")
            ).hexdigest()
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

    def steps_of(self, epochs: Sequence[int]) -> int | None:
        """See `Feed`; it is unknown how many samples there are."""
        return None

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
            mine = [sub for sub in layout.sub_batches(step) if self._rank in sub.ranks]
            step, samples = step + 1, samples + layout.num_samples(step)
            lanes = {lane: state for each in read for lane, state in each.lanes.items()}
            yield from _cut(read, mine, {"step": step, "samples": samples, "lanes": lanes})

    def _require_lanes(self, position: Position) -> None:
        for sub in self._layout.sub_batches(position["step"]):
            lanes = sub.lanes_of(self._config.lanes)
            for lane in _lanes_of_rank(sub, lanes, self._rank):
                if str(lane) not in position["lanes"]:
                    raise DataError(
                        f"the stored position has no lane {lane}; store the result of "
                        "merge_states over the states of all ranks"
                    )


def _lanes_of_rank(sub: SubBatch, lanes: range, rank: int) -> range:
    own = sub.ranks.index(rank) if rank in sub.ranks else len(lanes)
    return lanes[own :: len(sub.ranks)]


def _cut(
    read: Sequence[_Step], subs: Sequence[SubBatch], after: Position
) -> Iterator[tuple[Batch, Position | None]]:
    """The rank's micro-batches; the order of their samples does not depend on the workers."""
    bad = tuple(sample for each in read for sample in each.bad)
    for index, sub in enumerate(subs):
        rows = [each.rows[index] for each in read]
        images = torch.stack([each.images for each in rows], dim=1).flatten(0, 1)
        keys = [key for row in zip(*(each.keys for each in rows), strict=True) for key in row]
        for number in range(sub.micro_batches):
            last = index == len(subs) - 1 and number == sub.micro_batches - 1
            place = slice(number * sub.micro_batch_size, (number + 1) * sub.micro_batch_size)
            batch = Batch(images[place], keys[place], bad if last else ())
            yield batch, after if last else None


def _names(urls: Sequence[str]) -> list[str]:
    """Names without the URLs' queries, whose signatures change, where these names are unique."""
    plain = [url.partition("?")[0] if "://" in url else url for url in urls]
    return unique_names(plain if len(set(plain)) == len(set(urls)) else urls)


def _check_lanes(config: DataConfig, sub: SubBatch, shards: Sequence[int]) -> None:
    readers, lanes = len(sub.ranks) * max(config.workers, 1), config.lanes
    most, share = min(shards), sub.lanes[1] - sub.lanes[0]

    def fits(num: int) -> bool:
        mine = share * num
        whole = mine > 0 and mine.denominator == 1 and (sub.lanes[0] * num).denominator == 1
        return whole and mine % readers == 0 and sub.batch_size % mine == 0

    if fits(lanes) and lanes <= most:
        return
    fitting = [num for num in range(1, most + 1) if fits(num)]
    fitting.sort(key=lambda num: abs(num - lanes))
    advice = f"use {', '.join(map(str, sorted(fitting[:3])))}"
    if not fitting:
        advice = "no number fits: use fewer workers, more shards or another batch_size"
    shared = "" if share == 1 else f", of which one arm reads {share},"
    raise DataError(
        f"data.lanes={lanes}{shared} must be a multiple of {len(sub.ranks)} ranks x "
        f"{max(config.workers, 1)} workers, divide batch_size {sub.batch_size} and be at most "
        f"{most}, the shards of the smallest source; {advice}"
    )
