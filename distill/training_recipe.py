"""What every training run is, whatever it trains."""

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
from distill.engine import EngineConfig
from distill.errors import RecipeError
from distill.optimizer import OptimizerConfig
from distill.schedule import ScheduleConfig
from distill.tracking import TrackingConfig


class RunConfig(BaseModel):
    """One run: how long, on what, and where its files go.

    Attributes:
        dir: the run's folder; starting again with the same folder resumes.
        seed: of everything random.
        steps: optimiser steps.
        batch_size: images of one optimiser step, over all ranks.
        micro_batch_size: images of one forward pass on one rank; the rest is accumulated. None
            takes a rank's whole share at once.
        watchdog_s: seconds after which a step that hangs ends the run with every thread's trace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path
    seed: NonNegativeInt = 0
    steps: PositiveInt
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


class TrainingRecipe(BaseModel):
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


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """The recipe with every default written out, as plain data that loads again."""
    return recipe.model_dump(mode="json")
