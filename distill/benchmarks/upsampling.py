"""How true upsamplers are to their encoder, on images that no one trained on.

The multi-view fidelity of FeatSharp (arXiv 2502.16025), but held out, with views that are the same
for every method, and beside each method's own downsampler a plain average common to all.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from distill.benchmarks.fidelity import MAX_FIDELITY
from distill.benchmarks.seams import SeamRatio
from teachers.config import StrictConfig
from teachers.features import FeatureSpec
from teachers.teacher import Teacher
from teachers.upsamplers.downsampler import BoxDownsampler, Downsampler
from teachers.upsamplers.resize import resize
from teachers.upsamplers.standardised import Standardised
from teachers.upsamplers.views import ViewsConfig, sample_homographies, valid_mask, warp_images


class UpsamplerEvaluationConfig(StrictConfig):
    """What `distill.evaluate` measures upsamplers on.

    Attributes:
        images: a folder, archive or shards of images that no run trained on.
        num_views: views an image, as far from it as the paper's training views.
        seed: of the views.
        batch_size: images of one forward pass.
    """

    images: Path
    num_views: PositiveInt = 5
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 8

    @property
    def views(self) -> ViewsConfig:
        """The warps: shifts are in quarters of the encoder's cell, whatever the factor."""
        return ViewsConfig(num_views=self.num_views, shift_cells=0.25)


class Candidate(NamedTuple):
    """An upsampler, and the downsampler that it learned along."""

    upsampler: Standardised
    downsampler: Downsampler


class UpsamplingFidelity(NamedTuple):
    """One upsampler against its encoder; fidelities are one over a mean squared error.

    Errors are means over images, views, valid cells and channels, in the space that the upsampler
    was trained in (PHI-S, without the encoder's fixed pattern): a constant mean has fidelity 1,
    higher is better, and MAX_FIDELITY stands for no error at all.

    Attributes:
        own: of views, with the downsampler that it learned along.
        box: of views, with the plain average over each cell.
        true: of the map itself, to the encoder's at the factor times larger image; None where the
            encoder does not take that size, and at factor 1.
        seam_ratio: mean squared difference of neighbouring cells across the seams between tiles,
            over that elsewhere, at the same places within the encoder's cells: about 1 where no
            seam is seen. None at factor 1.
    """

    own: float
    box: float
    true: float | None
    seam_ratio: float | None


def held_out_views(config: UpsamplerEvaluationConfig, count: int, spec: FeatureSpec) -> Tensor:
    """The views of `count` images, (count, n, 3, 3); they depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(config.seed)
    return sample_homographies(config.views, count, spec.grid(*spec.resolution), generator)


@torch.no_grad()
def measure_upsamplers(
    candidates: Mapping[str, Candidate],
    teacher: Teacher,
    images: Tensor,
    homographies: Tensor,
    batch_size: int,
) -> dict[str, UpsamplingFidelity]:
    """Measures upsamplers of one factor; the encoder sees the views once for all of them.

    Args:
        candidates: name to upsampler, on the teacher's device.
        teacher: their encoder.
        images: uint8 (N, 3, H, W), at the upsamplers' `resolution`.
        homographies: (N, n, 3, 3) views of the images, see `held_out_views`.
        batch_size: images of one forward pass.

    Raises:
        RuntimeError: a map is not finite, or no cell of any view lies inside its image.
    """
    passes = {name: _Pass(candidate) for name, candidate in candidates.items()}
    for pixels, views in _batches(images, homographies, batch_size, teacher.mean.device):
        seen = teacher(warp_images(pixels, views, teacher.spec.resolution)).spatial
        true = teacher(pixels).spatial if _has_truth(teacher.spec, pixels) else None
        for each in passes.values():
            each.update(pixels, teacher, views, seen, true)
    return {name: each.finish() for name, each in passes.items()}


def _has_truth(spec: FeatureSpec, pixels: Tensor) -> bool:
    """Whether the encoder itself makes the denser map of larger images."""
    size, native = (pixels.shape[-2], pixels.shape[-1]), spec.resolution
    if size == native or not spec.accepts(*size):
        return False
    return all(
        n * s == m * r
        for n, s, m, r in zip(spec.grid(*size), native, spec.grid(*native), size, strict=True)
    )


class _Pass:
    """Collects one upsampler's errors over batches, in float64."""

    def __init__(self, candidate: Candidate) -> None:
        self._upsampler = candidate.upsampler
        box = BoxDownsampler(self._upsampler.factor)
        self._downsamplers: dict[str, Downsampler] = {"own": candidate.downsampler, "box": box}
        self._means = {name: _Mean() for name in ("own", "box", "true")}
        self._seams = SeamRatio(self._upsampler.factor, self._upsampler.factor)

    def update(
        self, pixels: Tensor, teacher: Teacher, views: Tensor, seen: Tensor, true: Tensor | None
    ) -> None:
        """Adds images (B, 3, H, W), with the encoder's maps of their views and of themselves."""
        high = self._upsampler.standardised(pixels, teacher).high.spatial.float()
        targets = self._upsampler.standardise(seen)
        mask = valid_mask(views.flatten(0, 1), (targets.shape[-2], targets.shape[-1]))
        for name, downsampler in self._downsamplers.items():
            shown = downsampler(high, views).flatten(0, 1)
            self._means[name].add((shown.double() - targets).square().mean(1, keepdim=True), mask)
        if true is not None:
            self._means["true"].add((high.double() - self._upsampler.standardise(true)).square())
        self._seams.add(high)

    def finish(self) -> UpsamplingFidelity:
        """The figures over all batches."""
        own, box, true = (self._means[name].inverse() for name in ("own", "box", "true"))
        if own is None or box is None:
            raise RuntimeError("a fidelity over no valid cell")
        return UpsamplingFidelity(own, box, true, self._seams.value())


class _Mean:
    """A running mean of squares; None while nothing was added."""

    def __init__(self) -> None:
        self._sum = self._count = 0.0

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Adds values, or those of them where the mask is one."""
        self._sum += float((values if mask is None else values * mask).sum())
        self._count += values.numel() if mask is None else float(mask.sum())

    def value(self) -> float | None:
        """The mean."""
        if not math.isfinite(self._sum):
            raise RuntimeError("a fidelity over maps that are not finite")
        return self._sum / self._count if self._count else None

    def inverse(self) -> float | None:
        """One over the mean, at most MAX_FIDELITY."""
        mean = self.value()
        if mean is None:
            return None
        return min(1 / mean, MAX_FIDELITY) if mean else MAX_FIDELITY


def _batches(
    images: Tensor, homographies: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels in [0, 1] and their views, on the device."""
    for batch, views in zip(images.split(size), homographies.split(size), strict=True):
        yield scale_pixels(batch, device), views.to(device)


@torch.no_grad()
def upsampled_maps(
    upsamplers: Mapping[str, Standardised], teacher: Teacher, pixels: Tensor
) -> dict[str, Tensor]:
    """Maps for a picture, in the encoder's own space: the encoder's, then each upsampler's.

    Args:
        upsamplers: title to upsampler.
        teacher: their encoder.
        pixels: (B, 3, H, W) in [0, 1].
    """
    maps = {"encoder": teacher(resize(pixels, teacher.spec.resolution)).spatial}
    for name, upsampler in upsamplers.items():
        maps[name] = upsampler(pixels, teacher).high.spatial
    return maps
