"""A teacher with an upsampler, which is a teacher again."""

from dataclasses import replace

import torch
from torch import Tensor

from teachers.even_cells import even_encoder
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.upsampler import UpsampledFeatures, Upsampler


def upsampled_spec(spec: FeatureSpec, factor: tuple[int, int]) -> FeatureSpec:
    """The spec of an encoder with `spec` after its map was upsampled by `factor`.

    The image grows by the same factor, so a cell still covers `patch_size` pixels; `factor`
    times the native resolution is the only one.
    """
    return replace(
        spec,
        resolution=scaled(spec.resolution, factor),
        any_resolution=False,
        padding=None,  # `even_encoder`
        native_grid=scaled(spec.grid(*spec.resolution), factor),
    )


class UpsampledTeacher(Teacher):
    """An encoder whose map is upsampled; its summary is that of the image at native resolution.

    Args:
        teacher: the encoder; it normalises the pixels and bounds its own batches.
        upsampler: built for `teacher.spec`.
    """

    wraps = True

    def __init__(self, teacher: Teacher, upsampler: Upsampler) -> None:
        spec = upsampled_spec(teacher.spec, upsampler.factor)
        spec = replace(spec, spatial_dim=upsampler.spatial_dim)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.teacher = teacher
        self.upsampler = upsampler

    @torch.no_grad()
    def upsample(self, images: Tensor) -> UpsampledFeatures:
        """The encoder's own features and the upsampled ones of images (B, 3, H, W) in [0, 1]."""
        return self.upsampler(images, even_encoder(self.teacher))

    def extract(self, images: Tensor) -> Features:
        """Runs the upsampler; see `Teacher.extract`. Here `images` are still in [0, 1]."""
        return self.upsample(images).high
