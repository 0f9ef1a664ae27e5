"""What every training run is, whatever it trains."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from data.config import DataConfig
from distill.engine.engine_config import EngineConfig
from distill.engine.optimizer import OptimizerConfig
from distill.engine.schedule import ScheduleConfig
from distill.runtime.tracking import TrackingConfig


class RunConfig(BaseModel):
    """One run: how long, on what, and where its files go.

    Attributes:
        dir: the run's folder; starting again with the same folder resumes.
        seed: of everything random.
        steps: optimiser steps.
        watchdog_s: seconds after which a step that hangs ends the run with every thread's trace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path
    seed: NonNegativeInt = 0
    steps: PositiveInt
    watchdog_s: float = Field(900.0, gt=0)


class CheckpointConfig(BaseModel):
    """When a run can be resumed from.

    Attributes:
        every: optimiser steps between two checkpoints; the last step is always saved.
        keep: whole checkpoints to keep.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt = 500
    keep: int = Field(2, ge=2)


class TrainingRecipe(BaseModel, ABC):
    """The sections that training anything needs; a recipe adds what it trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.schedule.warmup_steps >= self.run.steps:
            raise ValueError(
                f"schedule.warmup_steps: {self.schedule.warmup_steps} leaves nothing of the "
                f"run's {self.run.steps} steps"
            )
        return self

    @abstractmethod
    def require_ranks(self, ranks: int) -> None:
        """Raises RecipeError where a number of processes cannot share the run's batches."""


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe with every default written out, as plain data that loads again."""
    return recipe.model_dump(mode="json")
