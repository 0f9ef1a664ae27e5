"""A student's step, on models without weights: its own targets, forward pass, losses, backward."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.ema import AveragedModule
from distill.engine.engine import Autocast
from distill.engine.engine_config import EngineConfig
from distill.objective.mesa import EMA
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
from distill.targets.routes import RouteChoice, Size, bare_encoder, choose_route
from distill.targets.target_statistics import TargetStatistics
from distill.tasks.build import build_targets, prepare_student
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from distill.tasks.window_augmentation import window_shares
from distill.training.arms import MicroBatch
from distill.training.resolution import ResolutionSchedule, SizeConfig
from student.model import Student, StudentOutput
from teachers.multi_scale import MultiScaleTeacher
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.upsampler import Upsampler


def student_arms(recipe: StudentRecipe, running: Collection[str]) -> Iterator[Arm]:
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


class StudentWorkload(Workload):
    """The student and the teachers of a recipe, without weights.

    Args:
        recipe: the run's; initial weights are not read. Of a fine-tuning the file's header is,
            which says whose class tokens are old.

    Raises:
        RecipeError: a teacher cannot be built, the student's grid is beyond its upsamplers, or the
            recipe fine-tunes what it cannot.
        StudentError: the student does not fit its targets, or fine-tunes a file that is not there.
    """

    recipe: StudentRecipe
    trained: Student

    def __init__(self, recipe: StudentRecipe) -> None:
        self.recipe = recipe
        self.teachers = {
            name: imagined_teacher(config, recipe.targets.precision, f"teachers.{name}")
            for name, config in recipe.teachers.items()
        }
        with torch.device("meta"):
            self.trained = Student(recipe.student, {n: t.spec for n, t in self.teachers.items()})
        prepare_student(self.trained, recipe, self.teachers)
        self._average: Student | None = None
        if recipe.objective.mesa is not None:
            self._average = AveragedModule(self.trained, recipe.engine.ema_decay).module
        self.whole_average = self._average is not None
        targets = build_targets(recipe, self.teachers)
        running = targets.ensemble.teachers
        for name, teacher in running.items():
            statistics = TargetStatistics(any_phi_s(teacher.spec.spatial_dim), torch.ones(()))
            targets.statistics.of[name] = statistics
        self._engine = _StandIn(self.trained, self._average, recipe.engine)
        engine: Any = self._engine
        self._task = StudentTask(_plain(recipe), self.trained, engine, targets)
        self.arms = list(student_arms(recipe, running))
        self._imitation = Imitation()
        for module in self._modules():
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
        if self._average is not None:
            high = seen(arm.resolution, grid, width)
            size = count(self._average.trunk)
            rows.append(Row(EMA, *size, high, self._average_share, trained=False))
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
        """See `Workload.trace`.

        The step is one with the windows that hold most; its FLOPs are the mean over all steps.
        """
        pixels = self._imitation.tensor(images, 3, *arm.resolution)
        grid = self.trained.spec.grid(*arm.resolution)
        shares = window_shares(self.recipe.window_augmentation, grid)
        alone = {w: self._alone(arm, w) for w in shares} if len(shares) > 1 else {}
        self._engine.window = max(shares, key=lambda w: alone[w].peak if alone else 0)
        with Meter(*self._modules()) as meter, explained(arm):
            self._watch(meter, arm)
            meter.name("losses")
            total = self._task.loss(pixels, _micro_batch(arm, images)).total
            meter.name("heads")
            total.backward()
        self.trained.zero_grad()
        if alone:
            flops = [(images * shares[w], each.flops("student")) for w, each in alone.items()]
            meter.parts["student"].flops = _sum(flops)
        if self._average is not None:
            part = meter.parts[EMA]
            part.flops = _sum([(self._average_share, part.flops)])
        return traced(meter, images)

    def _alone(self, arm: Arm, window: int | None) -> Trace:
        """An image through the student within windows, and back, without teachers and losses."""
        self._engine.window = window
        with Meter(*self._modules()) as meter, explained(arm):
            self._watch(meter, arm)
            output = self._engine(self._imitation.tensor(1, 3, *arm.resolution), window)
            sums = [f.sum() for each in output.heads.values() for f in each if f is not None]
            torch.stack(sums).sum().backward()
        self.trained.zero_grad()
        return traced(meter, 1)

    def _watch(self, meter: Meter, arm: Arm) -> None:
        """Gives each model a part of the step."""
        meter.inside(self.trained.trunk, "student")
        for head in self.trained.heads.values():
            meter.inside(head, "heads")
        if self._average is not None:  # whose trunk is not called as a whole
            trunk = self._average.trunk
            for part in (trunk.embedding, *trunk.blocks, trunk.norm):
                meter.inside(part, EMA)
        for name in arm.routes:
            teacher = self.teachers[name]
            meter.inside(bare_encoder(teacher), name)
            if bare_encoder(teacher) is not teacher:
                meter.inside(teacher, f"{name}/upsampler")

    def _modules(self) -> list[nn.Module]:
        average = [] if self._average is None else [self._average]
        return [self.trained, *average, *self.teachers.values()]

    @property
    def _average_share(self) -> float:
        """Of the steps, those in which the average runs."""
        mesa = self.recipe.objective.mesa
        return max(0.0, 1 - mesa.start_step / self.recipe.run.steps) if mesa else 0.0

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.trained.trunk.activation_checkpointing

    @property
    def may_checkpoint(self) -> bool:
        """Whether `student.activation_checkpointing` goes with the recipe's options."""
        config = self.recipe.reparametrisation
        return config.spectral == "none" and not config.damp

    def switch_checkpointing(self) -> None:
        """Turns activation checkpointing on, or off where it is on."""
        self.trained.trunk.activation_checkpointing = not self.checkpointing

    @property
    def statistics_images(self) -> int:
        """See `Workload.statistics_images`."""
        needed = self.recipe.objective.needs_statistics
        return self.recipe.targets.statistics_images if needed else 0


class _StandIn:
    """What a task asks of the engine, without DeepSpeed.

    Attributes:
        averaged: see `Engine.averaged`.
        window: of the next pass, whatever the task has drawn.
    """

    steps = 0

    def __init__(self, student: Student, averaged: nn.Module | None, config: EngineConfig) -> None:
        self.averaged, self.config = averaged, config
        self.window: int | None = None
        self._module = Autocast(student, config.precision)

    def __call__(self, images: Tensor, window: int | None) -> StudentOutput:
        output: StudentOutput = self._module(images, self.window)
        return output


def _plain(recipe: StudentRecipe) -> StudentRecipe:
    """With MESA in every step, and without what looks at values, which costs no products."""
    mesa = recipe.objective.mesa
    changes = {
        "mesa": mesa and mesa.model_copy(update={"start_step": 0}),
        "equivariance": None,
        "dropping": 0.0,
        "tolerated_non_finite": 0,
    }
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update=changes)})


def _sum(counted: Iterable[tuple[float, Counter[torch.dtype]]]) -> Counter[torch.dtype]:
    """FLOPs times their weights, together."""
    total: dict[torch.dtype, float] = defaultdict(float)
    for weight, flops in counted:
        for dtype, number in flops.items():
            total[dtype] += weight * number
    return Counter({dtype: round(number) for dtype, number in total.items()})


def _micro_batch(arm: Arm, images: int) -> MicroBatch:
    """One micro-batch that is all of its step."""
    shares = dict.fromkeys(arm.routes, 1.0)
    return MicroBatch(arm.key, 0, images, 1.0, shares, 1.0, arm.routes)


def _upsampler(teacher: Teacher, grid: Size) -> Upsampler:
    """The one that runs for a grid."""
    if isinstance(teacher, MultiScaleTeacher):
        return teacher.covering(grid)
    assert isinstance(teacher, UpsampledTeacher)
    return teacher.upsampler
