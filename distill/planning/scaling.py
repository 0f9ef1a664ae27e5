"""How a recipe runs on so many GPUs: its micro-batches, memory, time, and what limits it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill.optimizer import flat_size
from distill.planning.machine import (
    GB,
    MEMORY_SHARE,
    Gpu,
    compute_seconds,
    link_seconds,
    reading_seconds,
)
from distill.planning.memory import Memory, Sharding
from distill.planning.step import Arm, Trace, Workload, count


@dataclass(frozen=True)
class ArmCost:
    """An arm at two sizes of its micro-batch, between and beyond which its bytes are a line.

    Attributes:
        arm: whose.
        trace: of its micro-batch.
        other: of another number of images.
    """

    arm: Arm
    trace: Trace
    other: Trace

    def at(self, images: float) -> Trace:
        """The trace of a micro-batch of so many images; its parts are those of `trace`."""
        x0, x1 = self.trace.images, self.other.images
        peak = _line(images, x0, self.trace.peak, x1, self.other.peak)
        known = self.trace.peak_with_gradients, self.other.peak_with_gradients
        # Gradients matter less the more images there are, and never less than nothing.
        together = max(peak, _line(images, x0, known[0], x1, known[1]))
        return Trace(math.floor(images), self.trace.parts, round(peak), round(together))


class Scaled(NamedTuple):
    """One optimiser step on so many GPUs.

    Attributes:
        gpus: how many.
        micro_batches: images of a forward pass on a rank, for each arm; empty where the batch does
            not divide over so many.
        accumulation: micro-batches of a step on a rank, of all arms.
        memory: of a rank.
        largest: micro-batches that would fit, for each arm; 0 where not even one image does.
        compute: seconds.
        communication: seconds, after the computation as the engine does not overlap them.
        data: seconds of reading, beside both where a rank has workers.
        step: seconds of all.
        hours: of all steps, and of the statistics before them.
    """

    gpus: int
    micro_batches: tuple[int, ...]
    accumulation: int
    memory: Memory
    largest: tuple[int, ...]
    compute: float
    communication: float
    data: float
    step: float
    hours: float

    @property
    def limit(self) -> str:
        """What takes most of the time."""
        times = {
            "compute": self.compute,
            "communication": self.communication,
            "data": self.data,
        }
        return max(times, key=lambda name: times[name])


def measure_arms(workload: Workload) -> list[ArmCost]:
    """Traces every arm at its micro-batch and at half of it (at two images where it is one)."""
    costs = []
    for arm in workload.arms:
        images = arm.micro_batch
        other = images // 2 or 2
        costs.append(ArmCost(arm, workload.trace(arm, images), workload.trace(arm, other)))
    return costs


class Scaling:
    """A recipe's step on any number of GPUs of a kind.

    Args:
        workload: its models.
        costs: of its arms.
        gpu: the kind.
        utilisation: share of the GPU's rate at which FLOPs are done.
        device_type: `cpu` where the engine runs on one, whose flat tensors are smaller.
    """

    def __init__(
        self,
        workload: Workload,
        costs: list[ArmCost],
        gpu: Gpu,
        utilisation: float,
        *,
        device_type: str = "cuda",
    ) -> None:
        self._workload, self._costs, self._gpu = workload, costs, gpu
        self._utilisation = utilisation
        parameters = count(workload.trained)[0]
        self.sharding = Sharding(workload.recipe.engine, parameters, flat_size(device_type))

    def on(self, gpus: int) -> Scaled | None:
        """The step on so many GPUs; None where the batch does not divide over them."""
        if any(cost.arm.batch_size % gpus for cost in self._costs):
            return None
        shares = [cost.arm.batch_size // gpus for cost in self._costs]
        micro = [_divisor(s, c.arm.micro_batch) for s, c in zip(shares, self._costs, strict=True)]
        accumulation = sum(s // m for s, m in zip(shares, micro, strict=True))
        compute = self._seconds(shares)
        sent = self.sharding.sent(gpus, accumulation)
        communication = link_seconds(sent, self._gpu, gpus)
        workers = self._workload.recipe.data.workers
        data = sum(
            reading_seconds(share, cost.arm.resolution, workers)
            for share, cost in zip(shares, self._costs, strict=True)
        )
        busy = compute + communication
        step = max(busy, data) if workers else busy + data
        before = self._statistics_seconds() / gpus
        memories = [
            self._memory(cost, images, gpus, accumulation)
            for cost, images in zip(self._costs, micro, strict=True)
        ]
        return Scaled(
            gpus=gpus,
            micro_batches=tuple(micro),
            accumulation=accumulation,
            memory=max(memories, key=lambda memory: memory.total),
            largest=tuple(self._largest(cost, gpus, accumulation) for cost in self._costs),
            compute=compute,
            communication=communication,
            data=data,
            step=step,
            hours=(self._workload.recipe.run.steps * step + before) / 3600,
        )

    def _memory(self, cost: ArmCost, images: float, gpus: int, accumulation: int) -> Memory:
        return self.sharding.memory(
            cost.at(images),
            gpus,
            accumulation=accumulation,
            teachers=sum(count(teacher)[1] for teacher in self._workload.frozen),
        )

    def _largest(self, cost: ArmCost, gpus: int, accumulation: int) -> int:
        """Images of the largest micro-batch that fits, found by halving."""
        room = self._gpu.memory * GB * MEMORY_SHARE
        low, high = 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._memory(cost, middle, gpus, accumulation).total <= room
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _seconds(self, shares: list[int]) -> float:
        flops: Counter[torch.dtype] = Counter()
        for share, cost in zip(shares, self._costs, strict=True):
            flops.update({d: n * share for d, n in cost.trace.flops().items()})
        return compute_seconds(flops, self._gpu, self._utilisation)

    def _statistics_seconds(self) -> float:
        """Of the teachers' passes before the first step, on one GPU."""
        cost = self._costs[0]
        parts = [row.part for row in self._workload.rows(cost.arm) if not row.trained]
        flops = cost.trace.flops(*parts)
        total = Counter({d: n * self._workload.statistics_images for d, n in flops.items()})
        return compute_seconds(total, self._gpu, self._utilisation)


def _divisor(share: int, most: int) -> int:
    """The largest divisor of a share that is at most so many."""
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def _line(at: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
