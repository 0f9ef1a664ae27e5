"""What the loop trains when it trains a student: teachers, objective, student, and its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed
from distill.engine import Engine
from distill.feature_statistics import save_statistics
from distill.objective import LossTerms, Objective
from distill.recipe import StudentRecipe
from distill.targets import Targets
from student.files import save_student
from student.model import Student, StudentOutput
from teachers.build import build_teacher, check_teacher
from teachers.features import FeatureSpec
from teachers.teacher import Teacher


def build_teachers(recipe: StudentRecipe) -> dict[str, Teacher]:
    """Builds and checks every teacher of a recipe, on this process's device."""
    teachers = {}
    for name, config in recipe.teachers.items():
        teachers[name] = build_teacher(config, device=distributed.device())
        check_teacher(teachers[name], name)
    return teachers


def running(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> dict[str, Teacher]:
    """The teachers that any loss of the recipe counts for; the others are never run."""
    return {n: t for n, t in teachers.items() if recipe.objective.runs(n, t.spec)}


class StudentTask:
    """A student under the engine, against its teachers' targets.

    Args:
        recipe: the run's.
        engine: holds the student.
        targets: the teachers that are run, with their statistics.
        specs: what every teacher promises, silent ones too.
    """

    def __init__(
        self,
        recipe: StudentRecipe,
        engine: Engine,
        targets: Targets,
        specs: Mapping[str, FeatureSpec],
    ) -> None:
        self.engine = engine
        self._recipe, self._targets, self._specs = recipe, targets, specs
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
            save_student(folder / "student.safetensors", self._recipe_student(), weights)
            for name, statistics in self._targets.statistics.items():
                save_statistics(folder / f"statistics/{name}.safetensors", statistics, "checkpoint")

    def draw(self, images: Tensor, path: Path) -> None:
        """Draws PCA panels of the teachers and the student side by side."""
        from distill.pictures import draw_panels

        self.engine.train(False)
        with torch.no_grad():
            output: StudentOutput = self.engine(images[:4])
        self.engine.train(True)
        if distributed.rank() == 0:
            targets = self._targets(images[:4])
            draw_panels(path, images[:4], targets, output)

    def _recipe_student(self) -> Any:
        return self._recipe.student


def build_student(recipe: StudentRecipe, specs: Mapping[str, FeatureSpec]) -> Student:
    """Builds the student with initial weights that depend on the recipe's seed only."""
    distributed.seed_default_generators(recipe.run.seed, "student")
    return Student(recipe.student, specs)
