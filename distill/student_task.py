"""What the loop trains when it trains a student: teachers, objective, student, and its files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill import distributed
from distill.engine import Engine
from distill.errors import RecipeError
from distill.evaluation.student_encoder import StudentEncoder
from distill.feature_statistics import save_statistics
from distill.objective import LossTerms, Objective
from distill.recipe import StudentRecipe
from distill.targets import Targets, teacher_input_size
from student.model import Student, StudentOutput
from student.storage import save_student, student_of
from teachers.build import TEACHERS, build_teacher
from teachers.check import check_teacher
from teachers.compiled import compile_teacher
from teachers.errors import TeacherError
from teachers.matched import MatchedTeacher
from teachers.teacher import Teacher


def build_teachers(recipe: StudentRecipe) -> dict[str, Teacher]:
    """Builds every teacher of a recipe, on this process's device, and checks the user's own.

    Raises:
        RecipeError: a teacher cannot be built or breaks the contract; names its entry.
    """
    teachers = {}
    dtype = torch.bfloat16 if recipe.targets.precision == "bf16" else None
    for name, config in recipe.teachers.items():
        try:
            teachers[name] = build_teacher(config, device=distributed.device(), dtype=dtype)
            if not TEACHERS.is_built_in(config.kind):
                check_teacher(teachers[name])
        except TeacherError as error:
            raise RecipeError(f"teachers.{name}: {error}") from error
        if recipe.targets.compile:
            compile_teacher(teachers[name])
    return teachers


def build_student(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> Student:
    """Builds the student; its initial weights depend on the recipe's seed only."""
    distributed.seed_default_generators(recipe.run.seed, "student")
    return Student(recipe.student, {name: teacher.spec for name, teacher in teachers.items()})


def build_targets(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> Targets:
    """The teachers that any loss of the recipe counts for; the others are never run.

    Raises:
        RecipeError: none counts, or the student's grid is beyond what a teacher's upsamplers reach.
    """
    running = {n: t for n, t in teachers.items() if recipe.objective.runs(n, t.spec)}
    if not running:
        raise RecipeError("objective.weights: every weight is zero, so there is nothing to learn")
    for name, teacher in running.items():
        if isinstance(teacher, MatchedTeacher):
            _check_reach(recipe, name, teacher)
    phi_s = recipe.objective.standardisation == "phi_s"
    return Targets(running, recipe.student.patch_size, phi_s=phi_s)


def _check_reach(recipe: StudentRecipe, name: str, teacher: MatchedTeacher) -> None:
    """Refuses what the teacher would refuse at the first image of that size."""
    evaluated = recipe.evaluation.resolutions if recipe.evaluation else []
    for size in (recipe.run.resolution, *evaluated):
        seen = teacher_input_size(teacher.spec, size, recipe.student.patch_size)
        try:
            teacher.covering(teacher.spec.grid(*seen))
        except TeacherError as error:
            raise RecipeError(
                f"teachers.{name}.upsampler: students of {size[0]} x {size[1]} px have {error}"
            ) from error


class StudentTask:
    """A student under the engine, against its teachers' targets.

    Args:
        recipe: the run's.
        student: what the engine holds; asked for its description only.
        engine: trains it.
        targets: the teachers that are run, with their statistics.
    """

    def __init__(
        self, recipe: StudentRecipe, student: Student, engine: Engine, targets: Targets
    ) -> None:
        self.engine = engine
        self._targets = targets
        self._config, self._specs = student.config, student.targets
        self._resolution = recipe.run.resolution
        self._objective = Objective(recipe.objective, targets.dispersions())

    def loss(self, images: Tensor) -> LossTerms:
        """The loss of one micro-batch (B, 3, H, W) in [0, 1]."""
        targets = self._targets(images)
        output: StudentOutput = self.engine(images)
        return self._objective(output.heads, targets)

    def save(self, folder: Path) -> None:
        """Writes the student as it would be exported, and its targets' statistics."""
        weights = self.engine.weights()
        if distributed.rank() == 0:
            save_student(
                folder / "student.safetensors", self._config, self._specs, weights, metadata={}
            )
            for name, statistics in self._targets.statistics.items():
                path = folder / "statistics" / f"{name}.safetensors"
                save_statistics(path, statistics, fingerprint="checkpoint")

    def encoder(self) -> StudentEncoder:
        """A copy of the student as it would be exported now; every rank must call this.

        Its native resolution is the one that the run trains at.
        """
        student = student_of(self._config, self._specs, self.engine.weights(), "the run's student")
        return StudentEncoder(student.to(distributed.device()), resolution=self._resolution)

    def draw(self, images: Tensor, path: Path) -> None:
        """Draws PCA panels of the teachers and the student side by side."""
        from distill.pictures import draw_panels

        self.engine.train(False)
        with torch.no_grad():
            output: StudentOutput = self.engine(images[:4])
        self.engine.train(True)
        if distributed.rank() == 0:
            draw_panels(path, images[:4], self._targets(images[:4]), {"student": output})
