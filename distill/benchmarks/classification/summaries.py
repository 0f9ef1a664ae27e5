"""One vector for each image, encoded once for all image-level benchmarks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from data.labelled.prepared import ImagePreparation, PreparationConfig, read_prepared
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.errors import TeacherError
from teachers.features import Features
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher

Reading = Literal["summary", "mean", "both"]
_GATHERED = 1 << 26  # numbers that ranks exchange at once: bounds memory on the device


class SummaryConfig(BenchmarkConfig):
    """The part of the recipe entry that all image-level benchmarks share.

    Attributes:
        images: preparation of images for the encoder.
        features: `summary`; `mean`, of the map; or `both`, concatenated. None for the summary if
            the encoder has one, else the mean; the protocol has the choice.
        batch_size: images encoded at once, on each rank.
    """

    images: PreparationConfig = PreparationConfig()
    features: Reading | None = None
    batch_size: PositiveInt = 64


class Summaries(NamedTuple):
    """The vectors of a set of images, distributed over the ranks.

    Attributes:
        own: (n, D) float32 on the CPU, of this rank's share of the images.
        total: number of images over all ranks.
    """

    own: Tensor
    total: int

    def gathered(self) -> Tensor:
        """All vectors, (total, D) float32 on the CPU of every rank, in the order of the images."""
        world = distributed.world_size()
        if world == 1:
            return self.own
        step = max(1, _GATHERED // (world * self.own.shape[1]))
        parts = []
        for start in range(0, -(-self.total // world), step):
            count = min(self.total, (start + step) * world) - start * world
            block = self.own[start : start + step].to(distributed.device())
            parts.append(gather_shares(block, count).cpu())
        return torch.cat(parts)


class Encoding:
    """Encodes sets of images by a benchmark's entry.

    Vectors are kept as long as the encoder exists, for other seeds and for other benchmarks that
    prepare the same images in the same way.

    Args:
        encoder: frozen.
        config: of the images and features.

    Raises:
        TeacherError: the encoder has no summary, or takes no images of this size.
    """

    def __init__(self, encoder: Teacher, config: SummaryConfig) -> None:
        self.encoder, self.batch_size = encoder, config.batch_size
        self.resolution = config.images.resolution or encoder.spec.resolution
        self.reading = _reading(encoder, config.features)
        self._prepared = ImagePreparation(config.images, self.resolution, encoder.spec.patch_size)
        _check(encoder, config.images, self.resolution)

    @property
    def protocol(self) -> dict[str, Any]:
        """The values that depend on the encoder."""
        return {"resolution": list(self.resolution), "features": self.reading}

    def __call__(
        self, names: Sequence[str], read: Callable[[str], bytes], identity: str
    ) -> Summaries:
        """The vectors of images; every rank encodes its share.

        Args:
            names: of the images.
            read: the bytes of one; called from several threads.
            identity: of the set; sets with equal identities have the same images.

        Raises:
            DataError: an image cannot be read.
        """
        known = _remembered(self.encoder)
        how = (identity, self._prepared.config.model_dump_json(), self.resolution, self.reading)
        if how not in known:
            own = [names[number] for number in own_share(len(names))]
            known[how] = self._encode(own, read)
        return Summaries(known[how], len(names))

    @torch.no_grad()
    def _encode(self, names: list[str], read: Callable[[str], bytes]) -> Tensor:
        device = self.encoder.mean.device
        vectors = torch.empty(len(names), self._dim, device=device)
        waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = defaultdict(list)

        def encode(rows: list[tuple[int, np.ndarray]]) -> None:
            pixels = torch.from_numpy(np.stack([image for _, image in rows])).to(device)
            images = scale_pixels(pixels.permute(0, 3, 1, 2))
            vectors[[row for row, _ in rows]] = read_vectors(self.encoder(images), self.reading)
            rows.clear()

        prepared = read_prepared(names, read, self._prepared)
        for row in tracked(range(len(names)), "encoding"):
            image = next(prepared)
            group = waiting[image.shape]  # a batch has images of one size
            group.append((row, image))
            if len(group) == self.batch_size:
                encode(group)
        for group in waiting.values():
            if group:
                encode(group)
        return vectors.cpu()

    @property
    def _dim(self) -> int:
        spec = self.encoder.spec
        summary = spec.summary_dim or 0
        dims = {"summary": summary, "mean": spec.spatial_dim, "both": summary + spec.spatial_dim}
        return dims[self.reading]


def read_vectors(features: Features, reading: Reading) -> Tensor:
    """One vector for each image, (B, D), from an encoder's features."""
    parts = []
    if reading != "mean":
        assert features.summary is not None
        parts.append(features.summary)
    if reading != "summary":
        parts.append(features.spatial.mean((2, 3)))
    return torch.cat(parts, 1)


def accuracy(scores: Tensor, labels: Tensor, top_k: int = 1) -> float:
    """Per cent of rows (N, K) whose label (N,) is among the `top_k` highest scores."""
    from torchmetrics.functional.classification import multiclass_accuracy  # slow to import

    share = multiclass_accuracy(
        scores, labels, num_classes=scores.shape[1], average="micro", top_k=top_k
    )
    return 100 * share.item()


def _reading(encoder: Teacher, asked: Reading | None) -> Reading:
    has_summary = encoder.spec.summary_dim is not None
    if asked is None:
        return "summary" if has_summary else "mean"
    if asked != "mean" and not has_summary:
        raise TeacherError(
            f"features: {asked}, but {type(encoder).__name__} has no summary; set mean, or remove "
            "the key, for the summary of encoders that have one and the mean of others"
        )
    return asked


def _check(encoder: Teacher, config: PreparationConfig, resolution: tuple[int, int]) -> None:
    spec = encoder.spec
    if config.fit == "whole":
        if not spec.any_resolution:
            h, w = spec.resolution
            raise TeacherError(
                f"images.fit: whole gives images of many sizes, and {type(encoder).__name__} takes "
                f"{h} x {w} px only; take crop or squash"
            )
    elif not spec.accepts(*resolution):
        h, w = spec.nearest(*resolution)
        raise TeacherError(
            f"images.resolution: {type(encoder).__name__} takes no images of {resolution[0]} x "
            f"{resolution[1]} px; the nearest size is [{h}, {w}]"
        )


_KNOWN: WeakKeyDictionary[Teacher, tuple[str, dict[Any, Tensor]]] = WeakKeyDictionary()


def _remembered(encoder: Teacher) -> dict[Any, Tensor]:
    """The cached vectors of an encoder, by how they were made; empty if its weights changed."""
    fingerprint = teacher_fingerprint(encoder)
    stored, vectors = _KNOWN.get(encoder, ("", {}))
    if stored != fingerprint:
        vectors = {}
        _KNOWN[encoder] = (fingerprint, vectors)
    return vectors
