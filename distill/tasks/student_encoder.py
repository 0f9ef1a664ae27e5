"""A student as an encoder: its backbone, or one of its heads."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from distill.runtime.errors import RecipeError
from student.model import Student
from student.timm_config import TimmStudentConfig
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.teacher import Teacher


class StudentEncoder(Teacher):
    """A frozen student with the interface of a teacher.

    Args:
        student: frozen in place, so nothing may train it.
        head: the teacher whose head is used; None for the backbone.
        resolution: (height, width) in pixels that a benchmark takes as the native one; None for
            the largest that the position table of a ViT covers, or the one that a network of timm
            was made for.

    Raises:
        RecipeError: there is no such head, or a side of its cells is no whole number of pixels.
    """

    fingerprinted_as = "distill.evaluation.student_encoder.StudentEncoder"
    wraps = True

    def __init__(
        self,
        student: Student,
        *,
        head: str | None = None,
        resolution: tuple[int, int] | None = None,
    ) -> None:
        spec = _spec(student, head)
        spec = replace(spec, resolution=resolution or spec.resolution)
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.student, self.head = student, head
        self.num_layers = student.trunk.num_layers if head is None else 0
        if head is None and isinstance(student.config, TimmStudentConfig):
            levels = student.config.network.levels[: self.num_layers]
            strides = tuple(level.stride for level in levels)
            if len(set(strides)) > 1:
                self.strides = strides

    def extract(self, images: Tensor) -> Features:
        """Runs the student, which normalises the pixels itself; see `Teacher.extract`."""
        output = self.student(images)
        return output.backbone if self.head is None else output.heads[self.head]

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The backbone's maps after some blocks or levels; a head has no such maps."""
        return self.student.forward_intermediates(images, indices)

    def fp32_modules(self) -> list[nn.Module]:
        """The heads, which compute in float32 even if the trunk is bfloat16."""
        return [self.student.heads]


def _spec(student: Student, head: str | None) -> FeatureSpec:
    """The spec of the backbone or of a head; it accepts any multiple of its patch size."""
    if head is None:
        return student.spec
    if head not in student.heads:
        known = list(student.heads)
        raise RecipeError(
            f"head: the student has no head {head!r}{did_you_mean(head, known)}; "
            f"there are {', '.join(known)}"
        )
    upsample = student.config.head.upsample.get(head, 1)
    if student.spec.patch_size % upsample:
        raise RecipeError(
            f"head: the map of {head!r} has {upsample} cells along a patch of "
            f"{student.spec.patch_size} px; a cell must be a whole number of pixels"
        )
    return replace(
        student.spec,
        summary_dim=student.targets[head].summary_dim,
        spatial_dim=student.targets[head].spatial_dim,
        patch_size=student.spec.patch_size // upsample,
        spatial_from=f"head of {head}",
        summary_from=f"head of {head}",
    )
