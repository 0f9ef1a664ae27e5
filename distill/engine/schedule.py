"""The learning-rate schedule: a pure function of the step, so that resuming needs no state."""

import math
from typing import Literal

from pydantic import Field, NonNegativeInt

from teachers.config import StrictConfig


class ScheduleConfig(StrictConfig):
    """The learning rate from the first to the last step.

    Attributes:
        kind: `cosine` and `linear` fall to `final_ratio`; `constant` stays at the peak.
        warmup_steps: number of steps of linear rise from `peak / (warmup_steps + 1)`.
        final_ratio: the last learning rate as a share of the peak, in [0, 1].
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_ratio: float = Field(0.0, ge=0, le=1)


def scheduled_ratio(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step as a share of the peak.

    A linear warm-up, then half a cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5,
    without restarts) or a straight line (segmentation's `poly` schedule of power 1).

    Args:
        config: the schedule.
        step: optimizer step, from 0.
        num_steps: number of optimizer steps of the whole run.

    Returns:
        A number in [0, 1]; it is 1 at step `warmup_steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.kind == "constant":
        return 1.0
    remaining = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / remaining)
    left = 1 - progress if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_ratio + (1 - config.final_ratio) * left
