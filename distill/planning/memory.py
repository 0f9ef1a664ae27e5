"""Bytes that a rank holds and sends in a step, for each ZeRO stage as our engine uses it.

Checked against DeepSpeed 0.19.8 by `tests/quality/plan_against_runs.py`: stage 1 keeps the whole
gradients and reduces them once a step; stage 2 keeps a slice of them and reduces at every
micro-batch, also by all-reduce; both gather the float32 weights after the step. In a single process
the module and ZeRO share the float32 weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

from distill.engine.engine_config import EngineConfig
from distill.planning.meter import Trace

_FLOAT = 4
_MOMENTS = 2  # of AdamW and NAdam
_HALF = 2


class Memory(NamedTuple):
    """Bytes of a rank at its peak.

    Attributes:
        weights: of the module under the engine, frozen ones included.
        masters: ZeRO's float32 slice of the weights, if it is a copy.
        moments: of the optimizer.
        average: of the weights.
        gradients: those that stay until the step.
        buckets: flat copies for a reduction or an update.
        teachers: their weights.
        activations: of a micro-batch, and gradients that do not stay.
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
        """The sum of all."""
        return sum(self)


class Collectives(NamedTuple):
    """Bytes of a step's collectives: reduced by all-reduces, moved by gathers and scatters."""

    reduced: float
    moved: float


@dataclass(frozen=True)
class Sharding:
    """How the ranks split what is trained.

    Attributes:
        config: stage, precision and averaging.
        parameters: number of trained ones.
        largest: number of elements that are flattened at once, see `optimizer.flat_size`.
        fixed: bytes of the module's frozen weights and buffers, which every rank holds.
        whole_average: whether every rank keeps the whole average, as MESA needs it.
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
            ranks: number of ranks.
            accumulation: micro-batches of one step.
            teachers: bytes of the teachers' weights on the rank.
        """
        config, whole = self.config, float(_FLOAT * self.parameters)
        mine = whole / ranks
        alone = ranks == 1 and config.zero_stage < 3 and config.precision != "fp16"
        own_gradients = whole if config.zero_stage == 1 else mine
        bucket = min(self.largest * _FLOAT, whole)
        # Gradients that add to the activations: all from the second micro-batch on, before that
        # those that exist when the activations are at their peak.
        if accumulation > 1:
            micro_batch = trace.peak + own_gradients
        else:
            extra = trace.peak_with_gradients - trace.peak
            micro_batch = trace.peak + extra * own_gradients / whole
        fullest = max(micro_batch, own_gradients + bucket)
        average = self.fixed + whole if self.whole_average else mine
        average = average if config.ema_decay else 0.0
        return Memory(
            weights=self.fixed + self._weights(whole, mine),
            masters=0.0 if alone else mine,
            moments=_MOMENTS * mine,
            average=average,
            gradients=own_gradients,
            buckets=bucket,
            teachers=teachers,
            activations=fullest - own_gradients,
        )

    def _weights(self, whole: float, mine: float) -> float:
        if self.config.zero_stage < 3:
            return whole * (_HALF / _FLOAT if self.config.precision == "fp16" else 1)
        # A slice that stays, and what is gathered: DeepSpeed frees what exceeds 1e9 parameters.
        return mine + min(whole, 1e9 * _FLOAT)

    def collectives(self, accumulation: float) -> Collectives:
        """Bytes that a step's collectives are called with: of the whole tensors, on any rank."""
        stage = self.config.zero_stage
        gradients = float(_FLOAT * self.parameters)
        weights = gradients * (_HALF / _FLOAT if self.config.precision == "fp16" else 1)
        if stage == 3:  # it gathers weights for the forward and for the backward pass
            return Collectives(0.0, accumulation * (gradients + 2 * weights))
        return Collectives(gradients * (accumulation if stage == 2 else 1), weights)

    def sent(self, ranks: int, accumulation: float) -> float:
        """Bytes that a rank sends in a step, with ring algorithms (Patarasuk and Yuan 2009).

        An all-reduce of n bytes sends 2 n (ranks - 1) / ranks, a gather or a scatter half of that.
        """
        reduced, moved = self.collectives(accumulation)
        return (ranks - 1) / ranks * (2 * reduced + moved)
