"""A student's step, on models without weights: its own targets, forward pass, losses, backward."""

import torch
from torch import Tensor

from distill.engine import Autocast
from distill.feature_statistics import TargetStatistics
from distill.objective import Objective
from distill.planning.meter import Imitation, Meter
from distill.planning.step import (
    Arm,
    Row,
    Trace,
    Workload,
    any_phi_s,
    count,
    explained,
    imagined_teacher,
    largest_micro_batch,
    seen,
    traced,
)
from distill.recipe import StudentRecipe
from distill.student_task import build_targets
from distill.targets import Targets, teacher_input_size
from student.model import Student, StudentOutput
from teachers.features import Features
from teachers.matched import MatchedTeacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.upsampler import Upsampler


class StudentWorkload(Workload):
    """The student and the teachers of a recipe, without weights.

    Args:
        recipe: the run's; initial weights are not read.

    Raises:
        RecipeError: a teacher cannot be built, or the student's grid is beyond its upsamplers.
        StudentError: the student does not fit its targets.
    """

    recipe: StudentRecipe
    trained: Student

    def __init__(self, recipe: StudentRecipe) -> None:
        self.recipe = recipe
        self.teachers = {
            name: imagined_teacher(config, recipe.targets.precision, f"teachers.{name}")
            for name, config in recipe.teachers.items()
        }
        config = recipe.student.model_copy(update={"init": None})
        with torch.device("meta"):
            self.trained = Student(config, {n: t.spec for n, t in self.teachers.items()})
        self.running = list(build_targets(recipe, self.teachers).teachers)
        run = recipe.run
        self.arms = [
            Arm(
                "student",
                run.resolution,
                run.batch_size,
                largest_micro_batch(recipe),
                tuple(self.running),
            )
        ]
        self.frozen = list(self.teachers.values())
        self._imitation = Imitation()
        for module in [self.trained, *self.frozen]:
            self._imitation.of(module)
        if recipe.engine.precision == "fp16":
            self.trained.half()
        self.trained.train()

    def rows(self, arm: Arm) -> list[Row]:
        """See `Workload.rows`."""
        grid, width = self.trained.spec.grid(*arm.resolution), self.trained.spec.spatial_dim
        rows = [
            Row("student", *count(self.trained.trunk), seen(arm.resolution, grid, width)),
            Row("heads", *count(self.trained.heads), ""),
        ]
        for name in arm.teachers:
            rows += self._teacher_rows(name, arm)
        return rows

    def _teacher_rows(self, name: str, arm: Arm) -> list[Row]:
        teacher = self.teachers[name]
        size = teacher_input_size(teacher.spec, arm.resolution, self.recipe.student.patch_size)
        grid, dim = teacher.spec.grid(*size), teacher.spec.spatial_dim
        if not isinstance(teacher, (UpsampledTeacher, MatchedTeacher)):
            return [Row(name, *count(teacher), seen(size, grid, dim), trained=False)]
        encoder = teacher.teacher
        native = encoder.spec.resolution
        upsampler = _upsampler(teacher, grid)
        low = seen(native, encoder.spec.grid(*native), encoder.spec.spatial_dim)
        return [
            Row(name, *count(encoder), low, upsampler.num_forwards, trained=False),
            Row(f"{name}/upsampler", *count(upsampler), seen(size, grid, dim), trained=False),
        ]

    def trace(self, arm: Arm, images: int) -> Trace:
        """See `Workload.trace`."""
        objective = self.recipe.objective
        pixels = self._imitation.tensor(images, 3, *arm.resolution)
        ones = {name: torch.ones(()) for name in arm.teachers}
        student = Autocast(self.trained, enabled=self.recipe.engine.precision == "bf16")
        with Meter(self.trained, *self.frozen) as meter, explained(arm):
            targets = {}
            for name in arm.teachers:
                targets[name] = self._target(meter, name, pixels)
            meter.inside(self.trained.trunk, "student")
            for head in self.trained.heads.values():
                meter.inside(head, "heads")
            output: StudentOutput = student(pixels)
            total = Objective(objective, ones)(output.heads, targets).total
            meter.name("heads")
            total.backward()
        self.trained.zero_grad()
        return traced(meter, images)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.trained.trunk.activation_checkpointing

    def switch_checkpointing(self) -> None:
        """Turns activation checkpointing on, or off where it is on."""
        self.trained.trunk.activation_checkpointing = not self.checkpointing

    @property
    def statistics_images(self) -> int:
        """See `Workload.statistics_images`."""
        objective = self.recipe.objective
        needed = objective.standardisation != "none" or objective.summary == "angle"
        return self.recipe.targets.statistics_images if needed else 0

    def _target(self, meter: Meter, name: str, pixels: Tensor) -> Features:
        """One teacher's target; its encoder is a part of its own where there is an upsampler."""
        teacher = self.teachers[name]
        phi_s = self.recipe.objective.standardisation == "phi_s"
        targets = Targets({name: teacher}, self.recipe.student.patch_size, phi_s=phi_s)
        statistics = TargetStatistics(any_phi_s(teacher.spec.spatial_dim), torch.ones(()))
        targets.statistics[name] = statistics
        part = name
        if isinstance(teacher, (UpsampledTeacher, MatchedTeacher)):
            meter.inside(teacher.teacher, name)
            part = f"{name}/upsampler"
        with meter.part(part):
            return targets(pixels)[name]


def _upsampler(teacher: UpsampledTeacher | MatchedTeacher, grid: tuple[int, int]) -> Upsampler:
    """The one that runs for a grid."""
    return teacher.covering(grid) if isinstance(teacher, MatchedTeacher) else teacher.upsampler
