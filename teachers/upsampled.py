"""A teacher plus an upsampler is again a teacher."""

from dataclasses import replace

import torch
from torch import Tensor

from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import UpsampledFeatures, Upsampler


def upsampled_spec(spec: FeatureSpec, factor: tuple[int, int]) -> FeatureSpec:
    """What an encoder with `spec` promises once its map is `factor` times denser.

    The image it takes grows by the same factor, so that a cell still covers `patch_size` pixels.
    One size only: the factor times the encoder's native resolution.
    """
    return replace(
        spec,
        resolution=scaled(spec.resolution, factor),
        any_resolution=False,
        native_grid=scaled(spec.grid(*spec.resolution), factor),
    )


class UpsampledTeacher(Teacher):
    """Features of an encoder at a resolution that it was not made for.

    Its summary is that of the whole image at the encoder's native resolution.

    Args:
        teacher: the encoder; it normalises the pixels and bounds its own batches.
        upsampler: built for `teacher.spec`.
    """

    def __init__(self, teacher: Teacher, upsampler: Upsampler) -> None:
        spec = upsampled_spec(teacher.spec, upsampler.factor)
        spec = replace(spec, spatial_dim=upsampler.spatial_dim)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.teacher = teacher
        self.upsampler = upsampler

    @torch.no_grad()
    def upsample(self, images: Tensor) -> UpsampledFeatures:
        """The encoder's own features and the sharpened ones.

        Args:
            images: (B, 3, H, W) in [0, 1], at any size.
        """
        return self.upsampler(images, self.teacher)

    def extract(self, images: Tensor) -> Features:
        """Runs the upsampler; see `Teacher.extract`. Here `images` are still in [0, 1]."""
        return self.upsample(images).high
