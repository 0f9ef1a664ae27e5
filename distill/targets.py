"""Images to what the teachers ask of the student: frozen, standardised, in float32.

Teachers live here, outside the module that DeepSpeed trains, so that they never reach an
optimiser or a checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from distill import distributed
from distill.feature_statistics import (
    StatisticsPass,
    TargetStatistics,
    load_statistics,
    save_statistics,
    statistics_fingerprint,
)
from teachers.features import Features, FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize


class TargetsConfig(BaseModel):
    """How the teachers are run.

    Attributes:
        precision: `bf16` stores and computes the teachers' matrices in it; norms stay float32.
        compile: has `torch.compile` make kernels of encoders and of upsamplers' fusion, at the
            first images of each size; about a minute for a large encoder.
        statistics_images: images, over all ranks, that the standardisation is estimated on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    statistics_images: PositiveInt = 2048


def teacher_input_size(spec: FeatureSpec, student: tuple[int, int], patch: int) -> tuple[int, int]:
    """The image size a teacher is given for student images of a size.

    The size that yields the student's grid (RADIOv2.5: student pixels x teacher patch / student
    patch) where the teacher takes it; else its native one.

    Args:
        spec: the teacher's.
        student: (height, width) of the student's images in pixels.
        patch: the student's patch size in pixels.
    """
    matched = (student[0] // patch * spec.patch_size, student[1] // patch * spec.patch_size)
    return matched if spec.accepts(*matched) else spec.resolution


class Targets:
    """The teachers that are run, and what standardises their maps.

    Args:
        teachers: name to teacher.
        student_patch: the student's patch size in pixels, which decides on matched grids; None
            where there is no student, and each teacher sees its native resolution.
        phi_s: whether targets are standardised; statistics may be set for their dispersion alone.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], student_patch: int | None, *, phi_s: bool = True
    ) -> None:
        self.teachers = dict(teachers)
        self.statistics: dict[str, TargetStatistics] = {}
        self._patch, self._phi_s = student_patch, phi_s

    def features(self, images: Tensor) -> dict[str, Features]:
        """Every teacher's own features.

        Args:
            images: (B, 3, H, W) in [0, 1], at the student's size where there is one.
        """
        size = (images.shape[-2], images.shape[-1])
        return {
            name: teacher(resize(images, self._input_size(teacher.spec, size)))
            for name, teacher in self.teachers.items()
        }

    def _input_size(self, spec: FeatureSpec, images: tuple[int, int]) -> tuple[int, int]:
        if self._patch is None:
            return spec.resolution
        return teacher_input_size(spec, images, self._patch)

    def __call__(self, images: Tensor) -> dict[str, Features]:
        """Every teacher's target: its features, the map standardised where the recipe asks."""
        return {name: self.standardise(name, f) for name, f in self.features(images).items()}

    def standardise(self, name: str, features: Features) -> Features:
        """Standardises one teacher's map, where the recipe asks for it."""
        if not self._phi_s:
            return features
        with torch.no_grad():
            return features._replace(spatial=self.statistics[name].phi_s(features.spatial))

    def dispersions(self) -> dict[str, Tensor]:
        """Teacher name to angular dispersion of its summaries, ()."""
        device = distributed.device()
        return {name: s.dispersion.to(device) for name, s in self.statistics.items()}

    def fit(
        self, batches: Iterator[Tensor], folder: Path, facts: Mapping[str, object], num_images: int
    ) -> dict[str, str]:
        """Estimates the statistics on all ranks, or reads them where they lie in a folder.

        Args:
            batches: this rank's images, (B, 3, H, W) in [0, 1]; read only when needed.
            folder: `<teacher>.safetensors` are read from and written to it.
            facts: what else the estimate depends on: data, sizes, number of images.
            num_images: images to see, over all ranks.

        Returns:
            Teacher name to `estimated` or `cached`.
        """
        prints = {
            name: statistics_fingerprint(teacher_fingerprint(teacher), facts)
            for name, teacher in self.teachers.items()
        }
        found = {
            name: load_statistics(folder / f"{name}.safetensors", fingerprint)
            for name, fingerprint in prints.items()
        }
        # Ranks may look at a shared folder at different moments: rank 0's view decides.
        missing = distributed.broadcast_object([name for name, s in found.items() if s is None])
        if missing:
            found |= self._estimate(missing, batches, num_images)
            if distributed.rank() == 0:
                for name in missing:
                    statistics = found[name]
                    assert statistics is not None
                    save_statistics(folder / f"{name}.safetensors", statistics, prints[name])
            distributed.barrier()
        device = distributed.device()
        for name, statistics in found.items():
            assert statistics is not None
            self.statistics[name] = statistics._replace(phi_s=statistics.phi_s.to(device))
        return {name: "estimated" if name in missing else "cached" for name in found}

    def _estimate(
        self, names: list[str], batches: Iterator[Tensor], num_images: int
    ) -> dict[str, TargetStatistics]:
        passes = {name: StatisticsPass(self.teachers[name].spec.spatial_dim) for name in names}
        seen = 0
        with self._only(names):
            while seen < num_images:
                images = next(batches)
                for name, features in self.features(images).items():
                    passes[name].update(features)
                seen += len(images) * distributed.world_size()
        return {name: each.finish() for name, each in passes.items()}

    @contextmanager
    def _only(self, names: list[str]) -> Iterator[None]:
        kept, self.teachers = self.teachers, {n: self.teachers[n] for n in names}
        try:
            yield
        finally:
            self.teachers = kept
