"""The student's input size in each step: one size, a random one of several, or stages of these.

Each step draws one size, the same on every rank, from the seed and the step alone. (AM-RADIO and
its successors draw one size a batch; C-RADIOv4 has six small and four large sizes.)
"""

from typing import Any, Self

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    RootModel,
    model_serializer,
    model_validator,
)

from distill.runtime import distributed
from teachers.config import StrictConfig
from teachers.upsamplers.resize import Size2d


class SizeConfig(StrictConfig):
    """One size, and the steps that may draw it.

    Attributes:
        size: the student's input in pixels, one number or [height, width].
        probability: of being drawn; those of a stage sum to 1. None for equal probabilities.
        start: first optimiser step of the size's stage, from 0.
        end: the optimiser step before which the stage ends; None for no end.
        batch_size: images of a step at this size, over all ranks; None for the arm's.
        micro_batch_size: images of one forward pass on one rank; None for the arm's.
    """

    size: Size2d
    probability: float | None = Field(None, gt=0, le=1)
    start: NonNegativeInt = 0
    end: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end: {self.end} is not after the stage's start, {self.start}")
        return self

    def at(self, step: int) -> bool:
        """Whether a step may draw it."""
        return self.start <= step and (self.end is None or step < self.end)


class ResolutionSchedule(RootModel[tuple[SizeConfig, ...]]):
    """Sizes with probabilities, in stages; a recipe may write one size as a number or a pair."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _from_one(cls, value: Any) -> Any:
        listed = isinstance(value, list | tuple)
        if listed and not value:
            raise ValueError("the list is empty; give a number, [height, width], or sizes")
        several = listed and any(isinstance(size, dict | SizeConfig) for size in value)
        return value if several else ({"size": value},)

    @model_validator(mode="after")
    def _every_step_has_one(self) -> Self:
        ends = {size.end for size in self.root if size.end is not None}
        for step in sorted({0, *ends, *(size.start for size in self.root)}):
            active = [size for size in self.root if size.at(step)]
            if not active:
                raise ValueError(
                    f"no size for step {step}; let another stage start there, or remove `end`"
                )
            given = [s.probability for s in active if s.probability is not None]
            if given and (len(given) < len(active) or abs(sum(given) - 1) > 1e-6):
                raise ValueError(
                    f"the probabilities at step {step} are {[s.probability for s in active]}; "
                    "they must sum to 1, or none may be given"
                )
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: Any) -> Any:
        return list(self.fixed) if self.fixed else write(self)

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(height, width) if every step has the same size, with no option of its own; else None."""
        (first, *others) = self.root
        return first.size if not others and first == SizeConfig(size=first.size) else None

    def draw(self, step: int, *purpose: int | str) -> SizeConfig:
        """The size of a step.

        Args:
            step: number of the optimiser step.
            purpose: seeds the draw together with the step: the run's seed and the arm's name.
        """
        active = [size for size in self.root if size.at(step)]
        point = distributed.derive_seed(*purpose, "resolution", step) / 2**63
        for size in active[:-1]:
            point -= size.probability or 1 / len(active)
            if point < 0:
                return size
        return active[-1]
