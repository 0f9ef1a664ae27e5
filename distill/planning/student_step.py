"""The step of a student's training: targets, forward pass, losses, backward pass."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from distill.engine.ema import AveragedModule
from distill.engine.engine import Autocast
from distill.engine.engine_config import EngineConfig
from distill.objective.mesa import EMA
from distill.parametrization.reparametrize import reparametrize
from distill.planning.meter import Meter, Trace
from distill.planning.step import Arm, ModelRow, Workload, encoder_shapes, meta_teacher
from distill.targets.routes import RouteChoice, Size, bare_encoder, choose_route
from distill.targets.target_statistics import TargetStatistics
from distill.tasks.build import build_targets, freeze_student
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.student_task import StudentTask
from distill.tasks.window_augmentation import window_shares
from distill.training.arms import MicroBatch
from distill.training.resolution import ResolutionSchedule, SizeConfig
from student.model import Student, StudentOutput
from student.timm_trunk import TimmTrunk
from student.trunk import Trunk
from teachers.multi_scale import MultiScaleTeacher
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.upsampler import Upsampler


def student_arms(recipe: StudentRecipe, running: Collection[str]) -> Iterator[Arm]:
    """Every image size of every arm, with the arm's teachers that are run (`running`)."""
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
    """The expected share of a run's steps that draw a size."""
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
        recipe: that of the run. The file of the initial student is not read, except for its header
            if the recipe fine-tunes: it names the teachers whose class tokens are old.

    Raises:
        RecipeError: a teacher cannot be built, a teacher has no route to the student's grid, or the
            student cannot be fine-tuned like this.
        StudentError: the student does not fit its targets, or the file to fine-tune is missing.
    """

    recipe: StudentRecipe
    trained: Student

    def __init__(self, recipe: StudentRecipe) -> None:
        self.recipe = recipe
        self.teachers = {
            name: meta_teacher(config, recipe.targets.precision, f"teachers.{name}")
            for name, config in recipe.teachers.items()
        }
        with torch.device("meta"):
            self.trained = Student(recipe.student, {n: t.spec for n, t in self.teachers.items()})
        freeze_student(self.trained, recipe, self.teachers)
        reparametrize(self.trained, recipe.reparametrisation)
        self._average: Student | None = None
        if recipe.objective.mesa is not None:
            self._average = AveragedModule(self.trained, recipe.engine.ema_decay).module
        self.whole_average = self._average is not None
        targets = build_targets(recipe, self.teachers)
        running = targets.ensemble.teachers
        for name, teacher in running.items():
            statistics = TargetStatistics(any_phi_s(teacher.spec.spatial_dim), torch.ones(()))
            targets.statistics.of[name] = statistics
        self._engine = EngineStub(self.trained, self._average, recipe.engine)
        self._task = StudentTask(_traceable(recipe), self.trained, self._engine, targets)
        self.arms = list(student_arms(recipe, running))
        if recipe.engine.precision == "fp16":
            self.trained.half()  # before its weights are fake: those cannot change their type
        self._fake = self._fake_weights()
        self.trained.train()

    def rows(self, arm: Arm) -> list[ModelRow]:
        """See `Workload.rows`."""
        spec = self.trained.spec
        shapes = encoder_shapes(arm.resolution, spec.grid(*arm.resolution), spec.spatial_dim)
        rows = [
            ModelRow("student", self.trained.trunk, shapes),
            ModelRow("heads", self.trained.heads),
            ModelRow("losses", nn.Module()),
        ]
        if self._average is not None:
            trunk = self._average.trunk
            rows.append(ModelRow(EMA, trunk, shapes, self._average_share, trained=False))
        for name, choice in arm.routes.items():
            rows += self._teacher_rows(name, arm.resolution, choice)
        return rows

    def _teacher_rows(self, name: str, size: Size, choice: RouteChoice) -> list[ModelRow]:
        teacher = self.teachers[name]
        encoder = bare_encoder(teacher)
        cell = self.recipe.student.cell_size(name, teacher.spec)
        route = choose_route(teacher, size, cell, choice)
        passes = route.forwards / route.images
        high = encoder_shapes(route.input_size, route.grid, teacher.spec.spatial_dim)
        if route.kind != "upsampler":
            return [ModelRow(name, encoder, high, passes, trained=False)]
        spec = encoder.spec
        low = encoder_shapes(spec.resolution, spec.grid(*spec.resolution), spec.spatial_dim)
        upsampler = _upsampler(teacher, route.grid)
        return [
            ModelRow(name, encoder, low, passes, trained=False),
            ModelRow(f"{name}/upsampler", upsampler, high, trained=False),
        ]

    def trace(self, arm: Arm, images: int) -> Trace:
        """See `Workload.trace`.

        Its bytes are those with the window size that takes most; its FLOPs are the mean over the
        steps.
        """
        pixels = self._fake.tensor(images, 3, *arm.resolution)
        grid = self.trained.spec.grid(*arm.resolution)
        shares = window_shares(self.recipe.window_augmentation, grid)
        alone = {w: self._alone(arm, w) for w in shares} if len(shares) > 1 else {}
        self._engine.window = max(shares, key=lambda w: alone[w].peak if alone else 0)
        with self._metered(arm) as meter:
            self._watch(meter, arm)
            meter.switch_to("losses")
            total = self._task.loss(pixels, _micro_batch(arm, images)).total
            meter.switch_to("heads")
            total.backward()
        if alone:
            flops = [(images * shares[w], each.flops("student")) for w, each in alone.items()]
            meter.components["student"].flops = _weighted_sum(flops)
        if self._average is not None:
            usage = meter.components[EMA]
            usage.flops = _weighted_sum([(self._average_share, usage.flops)])
        return meter.trace(images)

    def _alone(self, arm: Arm, window: int | None) -> Trace:
        """One image through the student, forward and backward, without teachers and losses."""
        self._engine.window = window
        with self._metered(arm) as meter:
            self._watch(meter, arm)
            output = self._engine(self._fake.tensor(1, 3, *arm.resolution), window)
            sums = [f.sum() for each in output.heads.values() for f in each if f is not None]
            torch.stack(sums).sum().backward()
        return meter.trace(1)

    def _watch(self, meter: Meter, arm: Arm) -> None:
        """Makes each model a component of the trace."""
        meter.watch(self.trained.trunk, "student")
        for head in self.trained.heads.values():
            meter.watch(head, "heads")
        if self._average is not None:
            for module in _called(self._average.trunk):
                meter.watch(module, EMA)
        for name in arm.routes:
            teacher = self.teachers[name]
            meter.watch(bare_encoder(teacher), name)
            if bare_encoder(teacher) is not teacher:
                meter.watch(teacher, f"{name}/upsampler")

    def _modules(self) -> list[nn.Module]:
        average = [] if self._average is None else [self._average]
        return [self.trained, *average, *self.teachers.values()]

    @property
    def _average_share(self) -> float:
        """The share of the steps in which the average runs."""
        mesa = self.recipe.objective.mesa
        return max(0.0, 1 - mesa.start_step / self.recipe.run.steps) if mesa else 0.0

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass recomputes the blocks."""
        return self.trained.trunk.activation_checkpointing

    @property
    def may_checkpoint(self) -> bool:
        """Whether the recipe's options allow `student.activation_checkpointing`."""
        config = self.recipe.reparametrisation
        return config.spectral == "none" and not config.damp

    def switch_checkpointing(self) -> None:
        """Turns activation checkpointing on or off."""
        self.trained.trunk.activation_checkpointing = not self.checkpointing

    @property
    def statistics_images(self) -> int:
        """See `Workload.statistics_images`."""
        needed = self.recipe.objective.needs_statistics
        return self.recipe.targets.statistics_images if needed else 0


class EngineStub:
    """An `Engine` that only runs forward passes, without DeepSpeed.

    Attributes:
        window: window size of the next pass, in place of the one that the task draws.
    """

    steps = 0

    def __init__(self, student: Student, averaged: nn.Module | None, config: EngineConfig) -> None:
        self.averaged, self.config = averaged, config
        self.window: int | None = None
        self._module = Autocast(student, config.precision)

    def __call__(self, *inputs: Any) -> StudentOutput:
        """See `Engine`."""
        output: StudentOutput = self._module(inputs[0], self.window)
        return output

    def _unsupported(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    train = weights = backward = step = save = load = close = _unsupported


def _called(trunk: Trunk | TimmTrunk) -> list[nn.Module]:
    """The modules of a trunk that run for the map of an average: a ViT is not called whole."""
    if isinstance(trunk, TimmTrunk):
        return [trunk]
    return [trunk.embedding, *trunk.blocks, trunk.norm]


def _traceable(recipe: StudentRecipe) -> StudentRecipe:
    """The recipe with MESA in every step, and without options that read values.

    Fake tensors have no values; those options cost no FLOPs that count.
    """
    mesa = recipe.objective.mesa
    changes = {
        "mesa": mesa and mesa.model_copy(update={"start_step": 0}),
        "equivariance": None,
        "dropping": 0.0,
        "tolerated_non_finite": 0,
    }
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update=changes)})


def _weighted_sum(counted: Iterable[tuple[float, Counter[torch.dtype]]]) -> Counter[torch.dtype]:
    total: dict[torch.dtype, float] = defaultdict(float)
    for weight, flops in counted:
        for dtype, number in flops.items():
            total[dtype] += weight * number
    return Counter({dtype: round(number) for dtype, number in total.items()})


def _micro_batch(arm: Arm, images: int) -> MicroBatch:
    """A micro-batch that is a whole step."""
    shares = dict.fromkeys(arm.routes, 1.0)
    return MicroBatch(arm.key, 0, images, 1.0, shares, 1.0, arm.routes)


def _upsampler(teacher: Teacher, grid: Size) -> Upsampler:
    """The upsampler of a teacher that runs for a grid."""
    if isinstance(teacher, MultiScaleTeacher):
        return teacher.covering(grid)
    assert isinstance(teacher, UpsampledTeacher)
    return teacher.upsampler
