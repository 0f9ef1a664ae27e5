"""Fidelity of upsamplers to their encoder on held-out images.

This is the multi-view fidelity of FeatSharp (arXiv 2502.16025) with three differences: images are
held out, all methods see the same views, and besides each method's own downsampler a plain average
is measured that is common to all.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from distill.benchmarks.fidelity import MAX_FIDELITY
from distill.benchmarks.seams import SeamRatio
from teachers.config import StrictConfig
from teachers.even_cells import even_encoder
from teachers.features import FeatureSpec
from teachers.teacher import Teacher
from teachers.upsamplers.downsampler import BoxDownsampler, Downsampler
from teachers.upsamplers.resize import resize
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.upsampler import Encode
from teachers.upsamplers.views import ViewsConfig, sample_homographies, valid_mask, warp_images


class UpsamplerEvaluationConfig(StrictConfig):
    """The images and views that `distill.evaluate` measures upsamplers on.

    Attributes:
        images: a folder, archive or shards of images that no run trained on.
        num_views: views of each image, warped as much as the paper's training views.
        seed: of the views.
        batch_size: images of one forward pass.
    """

    images: Path
    num_views: PositiveInt = 5
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 8

    @property
    def views(self) -> ViewsConfig:
        """The warps: shifts of a quarter of the encoder's cell, for any factor."""
        return ViewsConfig(num_views=self.num_views, shift_cells=0.25)


class UpsamplerPair(NamedTuple):
    """An upsampler, and the downsampler that was trained with it."""

    upsampler: Standardised
    downsampler: Downsampler


class UpsamplingFidelity(NamedTuple):
    """The result of one upsampler; a fidelity is one divided by a mean squared error.

    Errors are means over images, views, valid cells and channels, in the space of the upsampler's
    training (PHI-S, without the encoder's fixed pattern). The constant mean has fidelity 1, higher
    is better, and an error of 0 has MAX_FIDELITY.

    Attributes:
        own: of views, with the downsampler that was trained with the upsampler.
        box: of views, with the plain average over each cell.
        true: of the map itself, compared with the encoder's map of an image that is larger by the
            factor; None if the encoder does not take that size, and at factor 1.
        seam_ratio: see `seams.seam_ratio`; None at factor 1.
    """

    own: float
    box: float
    true: float | None
    seam_ratio: float | None


def held_out_views(config: UpsamplerEvaluationConfig, count: int, spec: FeatureSpec) -> Tensor:
    """The views of `count` images, (count, n, 3, 3), which depend only on the arguments."""
    generator = torch.Generator().manual_seed(config.seed)
    return sample_homographies(config.views, count, spec.grid(*spec.resolution), generator)


@torch.no_grad()
def measure_upsamplers(
    pairs: Mapping[str, UpsamplerPair],
    teacher: Teacher,
    images: Tensor,
    homographies: Tensor,
    batch_size: int,
) -> dict[str, UpsamplingFidelity]:
    """Measures upsamplers of one factor; the encoder runs once for all of them.

    Args:
        pairs: name to upsampler and downsampler, on the teacher's device.
        teacher: their encoder.
        images: uint8 (N, 3, H, W), at the upsamplers' `resolution`.
        homographies: (N, n, 3, 3) views of the images, see `held_out_views`.
        batch_size: images of one forward pass.

    Raises:
        RuntimeError: maps are not finite, or no cell of any view lies inside its image.
    """
    passes = {name: _Pass(pair) for name, pair in pairs.items()}
    device, encode = teacher.mean.device, even_encoder(teacher)
    for batch, homs in zip(images.split(batch_size), homographies.split(batch_size), strict=True):
        pixels, views = scale_pixels(batch, device), homs.to(device)
        seen = encode(warp_images(pixels, views, teacher.spec.resolution)).spatial
        true = encode(pixels).spatial if _has_truth(teacher.spec, pixels) else None
        for each in passes.values():
            each.update(pixels, encode, views, seen, true)
    return {name: each.finish() for name, each in passes.items()}


def _has_truth(spec: FeatureSpec, pixels: Tensor) -> bool:
    """Whether the encoder's own map of images of this size has the upsampled grid."""
    size, native = (pixels.shape[-2], pixels.shape[-1]), spec.resolution
    if size == native or not spec.accepts(*size):
        return False
    return all(
        n * s == m * r
        for n, s, m, r in zip(spec.grid(*size), native, spec.grid(*native), size, strict=True)
    )


class _Pass:
    """Accumulates the errors of one upsampler over batches, in float64."""

    def __init__(self, pair: UpsamplerPair) -> None:
        self._upsampler = pair.upsampler
        box = BoxDownsampler(self._upsampler.factor)
        self._downsamplers: dict[str, Downsampler] = {"own": pair.downsampler, "box": box}
        self._means = {name: _Mean() for name in ("own", "box", "true")}
        self._seams = SeamRatio(self._upsampler.factor, self._upsampler.factor)

    def update(
        self, pixels: Tensor, encode: Encode, views: Tensor, seen: Tensor, true: Tensor | None
    ) -> None:
        """Adds images (B, 3, H, W), with the encoder's maps of their views and of themselves."""
        high = self._upsampler.standardised(pixels, encode).high.spatial.float()
        targets = self._upsampler.standardise(seen)
        mask = valid_mask(views.flatten(0, 1), (targets.shape[-2], targets.shape[-1]))
        for name, downsampler in self._downsamplers.items():
            shown = downsampler(high, views).flatten(0, 1)
            self._means[name].add((shown.double() - targets).square().mean(1, keepdim=True), mask)
        if true is not None:
            self._means["true"].add((high.double() - self._upsampler.standardise(true)).square())
        self._seams.add(high)

    def finish(self) -> UpsamplingFidelity:
        """The result over all batches."""
        own, box, true = (self._means[name].inverse() for name in ("own", "box", "true"))
        if own is None or box is None:
            raise RuntimeError("fidelity: no cell of any view lies inside its image")
        return UpsamplingFidelity(own, box, true, self._seams.value())


class _Mean:
    """A running mean; None before the first value."""

    def __init__(self) -> None:
        self._sum = self._count = 0.0

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds values, with a mask only those where it is 1."""
        self._sum += float((values if mask is None else values * mask).sum())
        self._count += values.numel() if mask is None else float(mask.sum())

    def value(self) -> float | None:
        """The mean."""
        if not math.isfinite(self._sum):
            raise RuntimeError("fidelity: the maps are not finite")
        return self._sum / self._count if self._count else None

    def inverse(self) -> float | None:
        """One divided by the mean, at most MAX_FIDELITY."""
        mean = self.value()
        if mean is None:
            return None
        return min(1 / mean, MAX_FIDELITY) if mean else MAX_FIDELITY


@torch.no_grad()
def upsampled_maps(
    upsamplers: Mapping[str, Standardised], teacher: Teacher, pixels: Tensor
) -> dict[str, Tensor]:
    """The maps of the encoder and of each upsampler, in the encoder's own space, for a picture.

    Args:
        upsamplers: title to upsampler.
        teacher: their encoder.
        pixels: (B, 3, H, W) in [0, 1].
    """
    encode = even_encoder(teacher)
    maps = {"encoder": encode(resize(pixels, teacher.spec.resolution)).spatial}
    for name, upsampler in upsamplers.items():
        maps[name] = upsampler(pixels, encode).high.spatial
    return maps
