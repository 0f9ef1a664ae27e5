"""The sections of a recipe that every training run has, whatever it trains."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from data.config import DataConfig
from data.stream import TrainStream
from distill.engine.engine_config import EngineConfig
from distill.engine.optimizer import OptimizerConfig
from distill.engine.schedule import ScheduleConfig
from distill.runtime import distributed
from distill.runtime.tracking_config import TrackingConfig
from distill.targets.source import TargetsConfig
from distill.training.arms import StepPlan
from teachers.config import StrictConfig


class RunConfig(StrictConfig):
    """The length, seed and folder of a run.

    Attributes:
        dir: the run's folder; starting again with the same folder resumes the run.
        seed: of everything random.
        steps: optimiser steps.
        watchdog_s: seconds after which a step that hangs ends the run with every thread's trace. It
            covers nothing else: not loading, statistics, checkpoints, pictures, benchmarks, nor,
            with `targets.compile`, the first step of each image size.
        ranks_wait_s: seconds for which a rank waits for the others, in any phase. It bounds a hang
            of one of several ranks where `watchdog_s` does not.
        resume: `same` refuses to go on in a folder if that would change the result, and names the
            keys; `anyway` goes on and notes them in the folder's `changes.jsonl`.
    """

    dir: Path
    seed: NonNegativeInt = 0
    steps: PositiveInt
    watchdog_s: float = Field(900.0, gt=0)
    ranks_wait_s: float = Field(7200.0, gt=0)
    resume: Literal["same", "anyway"] = "same"


class CheckpointConfig(StrictConfig):
    """When checkpoints are written.

    Attributes:
        every: optimiser steps between two checkpoints; the last step is always saved.
        keep: complete checkpoints to keep, the newest ones.
    """

    every: PositiveInt = 500
    keep: int = Field(2, ge=2)


class TrainingRecipe(StrictConfig, ABC):
    """The common sections; a subclass adds what it trains.

    Attributes:
        targets: how teachers run, and on how many images their statistics are estimated.
    """

    run: RunConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    targets: TargetsConfig = TargetsConfig()

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.schedule.warmup_steps >= self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps} must be less than the "
                f"run's {self.run.steps} steps"
            )
        return self

    @property
    def precisions(self) -> dict[str, str]:
        """Key to value of each precision of the recipe."""
        of_targets = self.targets.precision
        return {"engine.precision": self.engine.precision, "targets.precision": of_targets}

    @property
    def compiles(self) -> bool:
        """Whether kernels compile in the first step of each image size, for minutes perhaps."""
        return self.targets.compile

    @abstractmethod
    def require_ranks(self, ranks: int) -> None:
        """Raises RecipeError if this number of processes cannot share the run's batches."""

    def open_stream(self, plan: StepPlan, *, purpose: str = "") -> TrainStream:
        """Opens this rank's images for a plan; a purpose other than training has its own order."""
        seed = self.run.seed
        return TrainStream(
            self.data,
            plan.layout,
            rank=distributed.rank(),
            seed=distributed.derive_seed(seed, purpose) if purpose else seed,
            index_dir=self.run.dir / "index",
        )


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe with every default written out, as plain data that loads again."""
    return recipe.model_dump(mode="json")
