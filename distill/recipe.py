"""What a student run is: the owners' configs put together, and the checks that span them."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from data.config import DataConfig
from distill.config import apply_overrides, load_yaml, validate
from distill.engine import EngineConfig
from distill.errors import RecipeError
from distill.evaluation.fidelity import EvaluationConfig
from distill.objective import ObjectiveConfig
from distill.optimizer import OptimizerConfig
from distill.schedule import ScheduleConfig
from distill.targets import TargetsConfig
from distill.tracking import TrackingConfig
from student.config import StudentConfig
from teachers.build import parse_teacher
from teachers.teacher import TeacherConfig
from teachers.upsamplers.resize import Factor

AnyTeacher = Annotated[SerializeAsAny[TeacherConfig], BeforeValidator(parse_teacher)]


class RunConfig(BaseModel):
    """One run: how long, on what, and where its files go.

    Attributes:
        dir: the run's folder; starting again with the same folder resumes.
        seed: of everything random.
        steps: optimiser steps.
        resolution: the student's input in pixels, one number or [height, width].
        batch_size: images of one optimiser step, over all ranks.
        micro_batch_size: images of one forward pass on one rank; the rest is accumulated. None
            takes a rank's whole share at once.
        watchdog_s: seconds after which a step that hangs ends the run with every thread's trace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path
    seed: NonNegativeInt = 0
    steps: PositiveInt
    resolution: Factor
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    watchdog_s: float = Field(900.0, gt=0)

    def micro_batch(self, world_size: int) -> int:
        """Images of one forward pass on one of `world_size` ranks.

        Raises:
            RecipeError: the batch does not divide; says which sizes do.
        """
        if self.batch_size % world_size:
            lower = self.batch_size // world_size * world_size
            fits = [size for size in (lower, lower + world_size) if size]
            raise RecipeError(
                f"run.batch_size: {self.batch_size} images do not divide over {world_size} ranks; "
                f"use {' or '.join(map(str, fits))}"
            )
        share = self.batch_size // world_size
        micro = self.micro_batch_size or share
        if share % micro:
            fits = [size for size in range(1, share + 1) if share % size == 0]
            nearest = min(fits, key=lambda size: abs(size - micro))
            raise RecipeError(
                f"run.micro_batch_size: {micro} does not divide a rank's share of {share} images "
                f"({self.batch_size} over {world_size} ranks); the nearest that does is {nearest}"
            )
        return micro


class CheckpointConfig(BaseModel):
    """When a run can be resumed from.

    Attributes:
        every: optimiser steps between two checkpoints; the last step is always saved.
        keep: whole checkpoints to keep.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt = 500
    keep: int = Field(2, ge=2)


class StudentRecipe(BaseModel):
    """A student and its teachers: `task: student`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["student"] = "student"
    run: RunConfig
    data: DataConfig
    teachers: dict[str, AnyTeacher] = Field(min_length=1)
    student: StudentConfig
    targets: TargetsConfig = TargetsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.teachers:
            if not name.isidentifier():
                raise ValueError(f"teachers.{name}: a teacher's name is letters, digits and _")
        for name in self.objective.weights:
            if name not in self.teachers:
                known = ", ".join(self.teachers)
                raise ValueError(f"objective.weights.{name}: no such teacher; there are {known}")
        if self.student.head.only is not None:
            raise ValueError(
                "student.head.only: is for exported students; in training, leave a teacher out of "
                "teachers, or set its weights in objective.weights to 0"
            )
        self._check_resolution("run.resolution", self.run.resolution)
        for number, resolution in enumerate(self.evaluation.resolutions if self.evaluation else ()):
            self._check_resolution(f"evaluation.resolutions.{number}", resolution)
        if self.schedule.warmup_steps >= self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps} leaves nothing of the "
                f"run's {self.run.steps} steps"
            )
        return self

    def _check_resolution(self, path: str, resolution: tuple[int, int]) -> None:
        patch = self.student.patch_size
        if any(side % patch for side in resolution):
            near = [max(patch, round(side / patch) * patch) for side in resolution]
            raise ValueError(
                f"{path}: {list(resolution)} px is no multiple of the student's "
                f"patch size of {patch}; the nearest that is: {near}"
            )


def load_student_recipe(path: Path, overrides: list[str]) -> StudentRecipe:
    """Reads a recipe and applies `section.key=value` overrides.

    Raises:
        RecipeError: names every mistake by its path.
    """
    tree = load_yaml(path)
    apply_overrides(tree, overrides)
    return validate(StudentRecipe, tree, str(path))


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe with every default written out, as plain data that loads again."""
    return recipe.model_dump(mode="json")
