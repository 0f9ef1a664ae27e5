"""Reads micro-batches of indexed shards by position in the global order, in the workers."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.bad import describe
from data.batch import BadSample, Batch
from data.decode import BadImage, ImageReader
from data.errors import DataError
from data.index import ShardIndex
from data.layout import Slice
from data.mixture import Mixture
from data.plan import SourcePlan
from data.seeds import sample_rng

_OPEN_FILES = 64


class ShardFiles:
    """Reads at offsets from many files; keeps a few of them open, and none when pickled."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: dict[int, int] = {}

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of file `number`, in one system call."""
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            file = self._open[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(file, size, offset)
        if len(data) < size:
            raise BadImage(f"the shard ends {size - len(data)} bytes too early")
        return data

    def close(self) -> None:
        """Closes all open files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": {}}

    def __del__(self) -> None:
        self.close()


class IndexedSource:
    """Reads the samples of one source in the order of its plan.

    Args:
        index: of the source's shards.
        plan: order of the samples.
        images: decoder of the images.
        seed: of the run.
        crops: see `SourceConfig`.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: SourcePlan,
        images: ImageReader,
        seed: int,
        crops: int | None = None,
    ) -> None:
        self._index = index
        self._plan = plan
        self._images = images
        self._seed, self._crops = seed, crops
        self._last = np.cumsum(index.counts).tolist()  # for bisect, faster than searchsorted
        self._files = ShardFiles(index.paths)

    @property
    def num_samples(self) -> int:
        """Samples in the source."""
        return len(self._index)

    def read(
        self, ordinal: int, resolution: tuple[int, int], bad: list[BadSample]
    ) -> tuple[str, np.ndarray]:
        """The key and the pixels, uint8 (H, W, 3), of the source's `ordinal`-th sample.

        A bad sample goes to `bad`; the next of its window replaces it.

        Raises:
            DataError: no sample of the window can be read.
        """
        place = self._plan.locate(ordinal)
        first_bad = len(bad)
        for step in range(len(place.window)):
            sample = int(place.window[(place.slot + step) % len(place.window)])
            key = "/".join(self._name(sample))
            try:
                data = self._bytes(sample)
                rng = sample_rng(self._seed, place.epoch, key, self._crops)
                pixels = self._images.read(data, resolution, rng)
            except (BadImage, OSError) as error:
                bad.append(BadSample(*self._name(sample), str(error)))
                continue
            return key, pixels
        names = "; ".join(describe(b) for b in bad[first_bad:][:3])
        raise DataError(
            f"none of {len(place.window)} samples in a shuffle window can be read: {names}"
        )

    def _shard(self, sample: int) -> int:
        return bisect_right(self._last, sample)

    def _name(self, sample: int) -> tuple[str, str]:
        return self._index.names[self._shard(sample)], self._index.key(sample)

    def _bytes(self, sample: int) -> bytes:
        offset, size = int(self._index.offsets[sample]), int(self._index.sizes[sample])
        return self._files.read(self._shard(sample), offset, size)


class MicroBatches(Dataset):
    """Micro-batches by their positions in the global order, of which `mixture` gives the source."""

    def __init__(self, sources: Sequence[IndexedSource], mixture: Mixture) -> None:
        self._sources = sources
        self._mixture = mixture

    def __getitem__(self, places: Slice) -> Batch | DataError:
        """One micro-batch, or its error: raised in a worker, it would lose its message."""
        keys: list[str] = []
        bad: list[BadSample] = []
        images = torch.empty((places.size, 3, *places.resolution), dtype=torch.uint8)
        pixels = images.numpy()
        for slot in range(places.size):
            source, ordinal = self._mixture.locate(places.first + slot)
            try:
                key, sample = self._sources[source].read(ordinal, places.resolution, bad)
            except DataError as error:
                return error
            keys.append(key)
            pixels[slot] = sample.transpose(2, 0, 1)
        return Batch(images, keys, tuple(bad))
