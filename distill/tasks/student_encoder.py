"""A student as an encoder: its backbone, or what one of its heads says."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from distill.runtime.errors import RecipeError
from student.model import Student
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.teacher import Teacher


class StudentEncoder(Teacher):
    """A student that is only read: in eval mode, without gradients.

    Args:
        student: no other module may hold it and train it.
        head: the teacher whose head is read; None for the backbone.
        resolution: (height, width) in pixels that a benchmark takes for its native one; None for
            the largest that the position table covers.

    Raises:
        RecipeError: no such head, or its cells are no whole pixels.
    """

    fingerprinted_as = "distill.evaluation.student_encoder.StudentEncoder"

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
        self.num_layers = len(student.trunk.blocks) if head is None else 0

    def extract(self, images: Tensor) -> Features:
        """Runs the student; see `Teacher.extract`. It normalises the pixels itself."""
        output = self.student(images)
        return output.backbone if self.head is None else output.heads[self.head]

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The backbone's maps after some blocks; a head has one map only."""
        return self.student.forward_intermediates(images, indices)

    def fp32_modules(self) -> list[nn.Module]:
        """The heads, which compute in float32 whatever the trunk does."""
        return [self.student.heads]


def _spec(student: Student, head: str | None) -> FeatureSpec:
    """What is read of the student promises; it takes any multiple of its patch."""
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
            f"head: the map of {head!r} has {upsample} cells a patch of {student.spec.patch_size} "
            "px and side; only whole pixels a cell can be measured"
        )
    return replace(
        student.spec,
        summary_dim=student.targets[head].summary_dim,
        spatial_dim=student.targets[head].spatial_dim,
        patch_size=student.spec.patch_size // upsample,
        spatial_from=f"head of {head}",
        summary_from=f"head of {head}",
    )
