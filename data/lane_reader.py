"""Reads the shards of one source in one lane, one after the other, and shuffles in chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.bad import describe
from data.batch import BadSample
from data.decode import BadImage, ImageReader
from data.errors import DataError
from data.seeds import Purpose, permutation, sample_rng
from data.tar_stream import StreamedImage, read_shard

# Epoch, index among the lane's shards, samples and defects to skip in that shard.
_Start = tuple[int, int, int]


@dataclass(frozen=True)
class StreamedSource:
    """One source, the same for all lanes.

    Attributes:
        number: of the source in the mixture.
        urls: of its shards.
        names: of its shards, as in keys.
        lanes: number of lanes.
        chunk: samples that a lane shuffles together.
        seed: of the run.
        allow_pipe: whether URLs may run commands.
        images: decoder of the images.
        crops: see `SourceConfig`.
    """

    number: int
    urls: tuple[str, ...]
    names: tuple[str, ...]
    lanes: int
    chunk: int
    seed: int
    allow_pipe: bool
    images: ImageReader
    crops: int | None


class LaneSource:
    """The samples of one source in one lane, without end.

    Args:
        source: what to read.
        lane: number of the lane.
        state: what `state` returned, or four zeros at the start.
    """

    def __init__(self, source: StreamedSource, lane: int, state: Sequence[int]) -> None:
        self._source = source
        self._lane = lane
        epoch, shard, skip, self._taken = state
        self._start: _Start = (epoch, shard, skip)
        self._chunks = self._read_chunks(self._start)
        self._items: list[StreamedImage | BadSample] | None = None
        self._order: list[int] = []
        self._barren = 0  # shards opened since the last usable sample

    def state(self) -> list[int]:
        """Start of the chunk (see `_Start`) and the samples used of it; JSON-able."""
        return [*self._start, self._taken]

    def read(self, resolution: tuple[int, int], bad: list[BadSample]) -> tuple[str, np.ndarray]:
        """The key and the pixels, uint8 (H, W, 3), of the next sample; appends bad ones to `bad`.

        Raises:
            DataError: as many consecutive shards as the source has contain no usable sample.
        """
        source, first_bad = self._source, len(bad)
        while True:
            try:
                item = self._next()
            except DataError as error:
                names = "; ".join(describe(b) for b in bad[first_bad:][:3])
                raise DataError(f"{error}: {names}") from None
            if isinstance(item, BadSample):
                bad.append(item)
                continue
            key = f"{item.shard}/{item.key}"
            try:
                rng = sample_rng(source.seed, self._start[0], key, source.crops)
                pixels = source.images.read(item.data, resolution, rng)
            except BadImage as error:
                bad.append(BadSample(item.shard, item.key, str(error)))
                continue
            self._barren = 0
            return key, pixels

    def _next(self) -> StreamedImage | BadSample:
        while self._items is None or self._taken == len(self._items):
            self._load()
        item = self._items[self._order[self._taken]]
        self._taken += 1
        return item

    def _load(self) -> None:
        restored = self._items is None and self._taken > 0
        if self._items is not None:
            self._taken = 0
        self._items = None  # freed before the next chunk is read
        self._start, self._items = next(self._chunks)
        source, num = self._source, len(self._items)
        if self._taken > num:
            shard, key = self._items[-1][:2]
            raise DataError(
                f"a resumed chunk had at least {self._taken} samples and now has {num}: the data "
                f"have changed, or cannot be read, before {shard}/{key}"
            )
        if restored:
            self._barren = 0  # the samples used of this chunk are not decoded again
        place = (source.number, self._lane, *self._start)
        self._order = permutation(num, source.seed, Purpose.LANE, *place).tolist()

    def _read_chunks(
        self, start: _Start
    ) -> Iterator[tuple[_Start, list[StreamedImage | BadSample]]]:
        """Yields chunks and their starts from `start` on; chunks end with the epoch."""
        source, (epoch, first, skip) = self._source, start
        while True:
            items: list[StreamedImage | BadSample] = []
            for shard, number in enumerate(self._dealt(epoch)):
                if shard < first:
                    continue
                self._count_shard()
                opened = read_shard(
                    source.urls[number], source.names[number], allow_pipe=source.allow_pipe
                )
                for place, item in enumerate(opened):
                    if place < skip:
                        continue
                    items.append(item)
                    if len(items) == source.chunk:
                        yield start, items
                        start, items = (epoch, shard, place + 1), []
                skip = 0
            if items:
                yield start, items
            epoch, first = epoch + 1, 0
            start = (epoch, 0, 0)

    def _dealt(self, epoch: int) -> list[int]:
        """The lane's shards of an epoch, dealt in turn from where the previous epoch ended."""
        source, num = self._source, len(self._source.urls)
        shards = permutation(num, source.seed, Purpose.SHARDS, source.number, epoch)
        return shards[(self._lane - epoch * num) % source.lanes :: source.lanes].tolist()

    def _count_shard(self) -> None:
        num = len(self._source.urls)
        if self._barren >= num:
            raise DataError(
                f"data.sources[{self._source.number}]: no readable image in {num} consecutive "
                "shards, as many as the source has"
            )
        self._barren += 1
