"""What the loop trains when it trains a student: teachers, objective, student, and its files."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from distill import distributed, mesa
from distill.engine import Engine
from distill.equivariance import build_views, central_crop
from distill.errors import RecipeError
from distill.evaluation.student_encoder import StudentEncoder
from distill.finetuning import freeze
from distill.objective import LossTerms, Objective
from distill.recipe import StudentRecipe
from distill.reparametrisation import materialised, reparametrise
from distill.targets import Targets, teacher_input_size
from distill.window_augmentation import draw_window
from student.config import StudentInit
from student.model import Student, StudentOutput
from student.storage import save_student, student_of
from teachers.build import TEACHERS, build_teacher
from teachers.check import check_teacher
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
    return teachers


def build_student(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> Student:
    """Builds the student; its initial weights depend on the recipe's seed only."""
    distributed.seed_default_generators(recipe.run.seed, "student")
    return Student(recipe.student, {name: teacher.spec for name, teacher in teachers.items()})


def prepare_student(
    student: Student, recipe: StudentRecipe, teachers: Mapping[str, Teacher]
) -> None:
    """Makes of a student, in place, what is trained: frozen parts, reparametrised weights."""
    if recipe.finetuning is not None:
        assert isinstance(recipe.student.init, StudentInit)
        running = [name for name, t in teachers.items() if recipe.objective.runs(name, t.spec)]
        freeze(student, recipe.student.init, recipe.finetuning, running)
    reparametrise(student, recipe.reparametrisation)


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
        self._resolution, self._patch = recipe.run.resolution, recipe.student.patch_size
        self._windows, self._seed = recipe.window_augmentation, recipe.run.seed
        self._equivariance, self._mesa = recipe.objective.equivariance, recipe.objective.mesa
        self._objective, self._step = Objective(recipe.objective, targets.dispersions()), 0

    def loss(self, images: Tensor) -> LossTerms:
        """The loss of one micro-batch (B, 3, H, W) in [0, 1], of `frame_size`."""
        if self.engine.steps != self._step:
            self._objective.finish_step()
            self._step = self.engine.steps
        generator = distributed.derived_generator("views")
        readers = [*self._targets.teachers, *([mesa.READER] if self._mesa else [])]
        views = build_views(self._equivariance, images, self._patch, readers, generator)
        targets = self._targets(views.student, views.of)
        height, width = views.student.shape[-2:]
        grid = (height // self._patch, width // self._patch)
        window = draw_window(self._windows, grid, self._seed, self.engine.steps)
        output: StudentOutput = self.engine(views.student, window)
        terms = self._objective(output.heads, targets, views.pairs)
        if self._mesa is None or self.engine.steps < self._mesa.start_step:
            return terms
        average = self._average_map(views.of(mesa.READER))
        loss = mesa.mesa_loss(output.backbone.spatial, average, views.pairs)
        total = terms.total + self._mesa.weight * loss
        return terms._replace(total=total, parts={**terms.parts, "mesa": loss.detach()})

    def _average_map(self, images: Tensor) -> Tensor:
        """The backbone map of the averaged weights."""
        average, autocast = self.engine.averaged, self.engine.config.precision == "bf16"
        assert isinstance(average, Student)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            return average.forward_intermediates(images, [len(average.trunk.blocks) - 1])[0]

    def save(self, folder: Path) -> None:
        """Writes the student as it would be exported, its targets' statistics and the state."""
        weights = materialised(self.engine.weights())
        self._objective.finish_step()
        if distributed.rank() == 0:
            save_student(
                folder / "student.safetensors", self._config, self._specs, weights, metadata={}
            )
            self._targets.save(folder / "statistics")
            if state := self._objective.state():
                torch.save(state, folder / "objective.pt")

    def load(self, folder: Path) -> None:
        """Goes back to a checkpoint's statistics, which stay as they are, and state."""
        self._targets.load(folder / "statistics")
        self._objective.dispersions = self._targets.dispersions()
        if self._objective.state():
            self._objective.restore(torch.load(folder / "objective.pt"))

    def encoder(self) -> StudentEncoder:
        """A copy of the student as it would be exported now; every rank must call this.

        Its native resolution is the one that the run trains at.
        """
        weights = materialised(self.engine.weights())
        student = student_of(self._config, self._specs, weights, "the run's student")
        return StudentEncoder(student.to(distributed.device()), resolution=self._resolution)

    def draw(self, images: Tensor, path: Path) -> None:
        """Draws PCA panels of the teachers and the student side by side."""
        from distill.pictures import draw_panels

        shown = central_crop(self._equivariance, images[:4], self._patch)
        self.engine.train(False)
        with torch.no_grad():
            output: StudentOutput = self.engine(shown)
        self.engine.train(True)
        if distributed.rank() == 0:
            draw_panels(path, shown, self._targets(shown), {"student": output})
