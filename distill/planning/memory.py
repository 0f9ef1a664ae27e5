"""Bytes that a rank holds and sends in a step, for each ZeRO stage as our engine uses it.

Held against DeepSpeed 0.19.8 by `tests/quality/plan_against_runs.py`: stage 1 keeps whole gradients
and reduces them once a step; stage 2 keeps a slice of them and reduces at every micro-batch, by
all-reduce too; both gather the float32 weights after the step. One process shares ZeRO's float32
weights with the module.
"""

from dataclasses import dataclass
from typing import NamedTuple

from distill.engine.engine_config import EngineConfig
from distill.planning.step import Trace

_FLOAT = 4
_MOMENTS = 2  # of AdamW and NAdam
_HALF = 2


class Memory(NamedTuple):
    """Bytes of a rank at its fullest.

    Attributes:
        weights: of the module under the engine, frozen ones included.
        masters: ZeRO's float32 slice of them, where it is another copy.
        moments: of the optimiser.
        average: of the weights.
        gradients: that stay where they are until the step.
        buckets: what is flattened for a reduction or an update.
        teachers: their weights.
        activations: of a micro-batch, and gradients on their way.
    """

    weights: float
    masters: float
    moments: float
    average: float
    gradients: float
    buckets: float
    teachers: float
    activations: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(self)


class Collectives(NamedTuple):
    """Bytes that a step's collectives are called with.

    Attributes:
        reduced: by all-reduces.
        moved: by gathers and scatters.
    """

    reduced: float
    moved: float


@dataclass(frozen=True)
class Sharding:
    """How the ranks split what is trained.

    Attributes:
        config: stage, precision and averaging.
        parameters: that are trained.
        largest: elements that are flattened at once, see `optimizer.flat_size`.
        fixed: bytes of the module's frozen weights and buffers, which every rank holds.
        whole_average: whether every rank keeps all of the average, as MESA asks for.
    """

    config: EngineConfig
    parameters: int
    largest: int
    fixed: float = 0.0
    whole_average: bool = False

    def memory(self, trace: Trace, ranks: int, *, accumulation: float, teachers: float) -> Memory:
        """Bytes of a rank.

        Args:
            trace: of a micro-batch.
            ranks: how many there are.
            accumulation: micro-batches of one step.
            teachers: bytes of their weights on every rank.
        """
        config, whole = self.config, float(_FLOAT * self.parameters)
        part = whole / ranks
        alone = ranks == 1 and config.zero_stage < 3 and config.precision != "fp16"
        own_gradients = whole if config.zero_stage == 1 else part
        bucket = min(self.largest * _FLOAT, whole)
        # Gradients on top of activations: all from the second micro-batch on, else those that are
        # there when most activations still are.
        if accumulation > 1:
            micro_batch = trace.peak + own_gradients
        else:
            extra = trace.peak_with_gradients - trace.peak
            micro_batch = trace.peak + extra * own_gradients / whole
        fullest = max(micro_batch, own_gradients + bucket)
        return Memory(
            weights=self.fixed + self._weights(whole, part),
            masters=0.0 if alone else part,
            moments=_MOMENTS * part,
            average=self._average(whole, part),
            gradients=own_gradients,
            buckets=bucket,
            teachers=teachers,
            activations=fullest - own_gradients,
        )

    def _average(self, whole: float, part: float) -> float:
        if not self.config.ema_decay:
            return 0.0
        return self.fixed + whole if self.whole_average else part

    def _weights(self, whole: float, part: float) -> float:
        if self.config.zero_stage < 3:
            return whole * (_HALF / _FLOAT if self.config.precision == "fp16" else 1)
        # A slice that stays, and what is gathered: DeepSpeed lets go of it beyond 1e9 parameters.
        return part + min(whole, 1e9 * _FLOAT)

    def collectives(self, accumulation: float) -> Collectives:
        """Bytes that the collectives of a step are called with, whole on every rank."""
        stage = self.config.zero_stage
        gradients = float(_FLOAT * self.parameters)
        weights = gradients * (_HALF / _FLOAT if self.config.precision == "fp16" else 1)
        if stage == 3:  # weights for the forward and for the backward pass
            return Collectives(0.0, accumulation * (gradients + 2 * weights))
        return Collectives(gradients * (accumulation if stage == 2 else 1), weights)

    def sent(self, ranks: int, accumulation: float) -> float:
        """Bytes that a rank sends in a step, through rings (Patarasuk and Yuan 2009).

        An all-reduce of n bytes sends 2 n (ranks - 1) / ranks, a gather or a scatter half of it.
        """
        reduced, moved = self.collectives(accumulation)
        return (ranks - 1) / ranks * (2 * reduced + moved)
