"""A student's step, on models without weights: its own targets, forward pass, losses, backward."""

from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

import torch

from distill.arms import Pass
from distill.engine import Autocast, EngineConfig
from distill.errors import RecipeError
from distill.feature_statistics import TargetStatistics
from distill.planning.meter import Imitation, Meter
from distill.planning.step import (
    Arm,
    Row,
    Trace,
    Workload,
    count,
    explained,
    imagined_teacher,
    seen,
    traced,
)
from distill.recipe import StudentRecipe
from distill.resolution import ResolutionSchedule, SizeConfig
from distill.routes import RouteChoice, Size, bare_encoder, choose_route
from distill.student_task import StudentTask, build_targets
from distill.window_augmentation import WindowAugmentationConfig
from student.model import Student, StudentOutput
from teachers.matched import MatchedTeacher
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.upsampler import Upsampler


class StudentWorkload(Workload):
    """The student and the teachers of a recipe, without weights.

    Args:
        recipe: the run's; initial weights are not read.

    Raises:
        RecipeError: a teacher cannot be built, the student's grid is beyond its upsamplers, or the
            recipe fine-tunes.
        StudentError: the student does not fit its targets.
    """

    recipe: StudentRecipe
    trained: Student

    def __init__(self, recipe: StudentRecipe) -> None:
        self.recipe = recipe
        if recipe.finetuning is not None:
            raise RecipeError(
                "finetuning: which weights stay frozen is known from the student's file, which a "
                "plan does not read; plan the recipe without it for an upper bound"
            )
        self.teachers = {
            name: imagined_teacher(config, recipe.targets.precision, f"teachers.{name}")
            for name, config in recipe.teachers.items()
        }
        self.whole_average = recipe.objective.mesa is not None
        config = recipe.student.model_copy(update={"init": None})
        with torch.device("meta"):
            self.trained = Student(config, {n: t.spec for n, t in self.teachers.items()})
        targets = build_targets(recipe, self.teachers)
        for name, teacher in targets.teachers.items():
            statistics = TargetStatistics(any_phi_s(teacher.spec.spatial_dim), torch.ones(()))
            targets.statistics[name] = statistics
        engine: Any = _StandIn(self.trained, recipe.engine)
        self._task = StudentTask(_plain(recipe), self.trained, engine, targets)
        self.arms = list(_arms(recipe, targets.teachers))
        self._imitation = Imitation()
        for module in [self.trained, *self.teachers.values()]:
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
            Row("losses", 0, 0, ""),
        ]
        for name, choice in arm.routes.items():
            rows += self._teacher_rows(name, arm.resolution, choice)
        return rows

    def _teacher_rows(self, name: str, size: Size, choice: RouteChoice) -> list[Row]:
        teacher = self.teachers[name]
        encoder, dim = bare_encoder(teacher), teacher.spec.spatial_dim
        route = choose_route(teacher, size, self.recipe.student.patch_size, choice)
        passes, high = route.forwards / route.images, seen(route.input_size, route.grid, dim)
        if route.kind != "upsampler":
            return [Row(name, *count(encoder), high, passes, trained=False)]
        spec = encoder.spec
        low = seen(spec.resolution, spec.grid(*spec.resolution), spec.spatial_dim)
        upsampler = _upsampler(teacher, route.grid)
        return [
            Row(name, *count(encoder), low, passes, trained=False),
            Row(f"{name}/upsampler", *count(upsampler), high, trained=False),
        ]

    def trace(self, arm: Arm, images: int) -> Trace:
        """See `Workload.trace`."""
        pixels = self._imitation.tensor(images, 3, *arm.resolution)
        with Meter(self.trained, *self.teachers.values()) as meter, explained(arm):
            meter.inside(self.trained.trunk, "student")
            for head in self.trained.heads.values():
                meter.inside(head, "heads")
            for name in arm.routes:
                teacher = self.teachers[name]
                meter.inside(bare_encoder(teacher), name)
                if bare_encoder(teacher) is not teacher:
                    meter.inside(teacher, f"{name}/upsampler")
            meter.name("losses")
            total = self._task.loss(pixels, _pass(arm, images)).total
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


class _StandIn:
    """What a task asks of the engine, without DeepSpeed."""

    steps = 0

    def __init__(self, student: Student, config: EngineConfig) -> None:
        self._module = Autocast(student, enabled=config.precision == "bf16")

    def __call__(self, *inputs: Any) -> StudentOutput:
        output: StudentOutput = self._module(*inputs)
        return output


def _plain(recipe: StudentRecipe) -> StudentRecipe:
    """Without what is drawn for each image or step: tensors without data cannot be cut by it."""
    objective = recipe.objective.model_copy(update={"equivariance": None, "mesa": None})
    return recipe.model_copy(
        update={"objective": objective, "window_augmentation": WindowAugmentationConfig()}
    )


def _pass(arm: Arm, images: int) -> Pass:
    """One micro-batch that is all of its step."""
    shares = dict.fromkeys(arm.routes, 1.0)
    return Pass(arm.key, 0, images, 1.0, shares, 1.0, arm.routes)


def _arms(recipe: StudentRecipe, running: Collection[str]) -> Iterator[Arm]:
    """Every size of every arm, with the teachers that are run."""
    for name, config in recipe.placed_arms.items():
        seen_by = config.teachers or tuple(recipe.teachers)
        routes = {t: config.routes.get(t, "auto") for t in seen_by if t in running}
        sizes = config.resolution.root
        for size in sizes:
            batch = size.batch_size or config.batch_size
            micro = size.micro_batch_size or config.micro_batch_size or batch
            label = f" {size.size[0]} x {size.size[1]}" if len(sizes) > 1 else ""
            yield Arm(
                name,
                (name or "student") + label,
                size.size,
                batch,
                min(micro, batch),
                routes,
                _share(config.resolution, size, recipe.run.steps),
                config.ranks,
            )


def _share(schedule: ResolutionSchedule, size: SizeConfig, steps: int) -> float:
    """Of a run's steps, those that draw a size, on average."""
    edges = {0, steps, *(e for s in schedule.root for e in (s.start, s.end or steps) if e < steps)}
    total = 0.0
    for start, end in pairwise(sorted(edges)):
        active = [s for s in schedule.root if s.at(start)]
        if size in active:
            total += (end - start) * (size.probability or 1 / len(active))
    return total / steps


def _upsampler(teacher: Teacher, grid: Size) -> Upsampler:
    """The one that runs for a grid."""
    if isinstance(teacher, MatchedTeacher):
        return teacher.covering(grid)
    assert isinstance(teacher, UpsampledTeacher)
    return teacher.upsampler
