"""Scales a recipe to a number of GPUs: micro-batches, memory, time, and what limits it."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill.engine.optimizer import flat_size
from distill.planning.machine import GB, MEMORY_SHARE, Speed, link_seconds, reading_seconds
from distill.planning.memory import Memory, Sharding
from distill.planning.meter import Trace
from distill.planning.step import Arm, Workload, num_bytes
from distill.runtime.errors import RecipeError


@dataclass(frozen=True)
class ArmCost:
    """An arm, traced at two sizes of its micro-batch; its memory is linear in the size."""

    arm: Arm
    trace: Trace
    other: Trace

    def at(self, images: float) -> Trace:
        """The trace of a micro-batch of `images`, with the components of `self.trace`."""
        x0, x1 = self.trace.images, self.other.images
        peak = _line(images, x0, self.trace.peak, x1, self.other.peak)
        known = self.trace.peak_with_gradients, self.other.peak_with_gradients
        # With more images gradients add less to the peak, but never less than nothing.
        with_gradients = max(peak, _line(images, x0, known[0], x1, known[1]))
        components = self.trace.components
        return Trace(math.floor(images), components, round(peak), round(with_gradients))


class Scaled(NamedTuple):
    """One optimizer step on a number of GPUs, averaged over the sizes of its images.

    Attributes:
        gpus: number of GPUs.
        micro_batches: images of one forward pass on one rank, for each arm.
        accumulation: micro-batches of a step on one rank.
        memory: of the rank that needs most.
        largest: images of the largest micro-batch that fits, for each arm; 0 if not even one does.
        compute: seconds of computation on the slowest rank.
        communication: seconds of collectives, after the computation: the engine overlaps nothing.
        data: seconds of reading images, in parallel to both if a rank has workers.
        step: seconds of the whole step.
        hours: of all steps, and of the teachers' statistics before them.
    """

    gpus: int
    micro_batches: tuple[int, ...]
    accumulation: float
    memory: Memory
    largest: tuple[int, ...]
    compute: float
    communication: float
    data: float
    step: float
    hours: float

    @property
    def limit(self) -> str:
        """What takes the most time: `compute`, `communication` or `data`."""
        return max(("compute", "communication", "data"), key=lambda name: getattr(self, name))


class _Placed(NamedTuple):
    """An arm on the ranks that run it."""

    cost: ArmCost
    share: int  # images of a step on one rank
    micro_batch: int

    @property
    def passes(self) -> float:
        """Forward passes of one rank in a step, on average."""
        return self.cost.arm.share * self.share / self.micro_batch


def measure_arms(workload: Workload) -> list[ArmCost]:
    """Traces every arm at its micro-batch and at half of it (at two images if it is one)."""
    costs = []
    for arm in workload.arms:
        images = arm.micro_batch
        other = images // 2 or 2
        costs.append(ArmCost(arm, workload.trace(arm, images), workload.trace(arm, other)))
    return costs


class Scaling:
    """The step of a recipe on any number of GPUs of one kind.

    Args:
        workload: the models of the recipe.
        costs: of its arms.
        speed: of the GPUs.
        device_type: `cpu` for an engine on the CPU, whose flat tensors are smaller.

    Attributes:
        sharding: how the ranks split the weights.
    """

    def __init__(
        self, workload: Workload, costs: list[ArmCost], speed: Speed, *, device_type: str = "cuda"
    ) -> None:
        self._workload, self._costs, self._speed = workload, costs, speed
        trained = [p for p in workload.trained.parameters() if p.requires_grad]
        self.sharding = Sharding(
            workload.recipe.engine,
            parameters=sum(p.numel() for p in trained),
            largest=flat_size(device_type),
            fixed=num_bytes(workload.trained) - sum(p.nbytes for p in trained),
            whole_average=workload.whole_average,
        )

    def on(self, gpus: int) -> Scaled:
        """The step on a number of GPUs.

        Raises:
            RecipeError: a batch or the ranks of the arms do not divide over them.
        """
        groups = self._groups(gpus)
        accumulation = max(sum(each.passes for each in group) for group in groups)
        compute = max(self._compute(group) for group in groups)
        sent = self.sharding.sent(gpus, accumulation)
        communication = link_seconds(sent, self._speed.gpu, gpus)
        workers = self._workload.recipe.data.workers
        data = max(_reading(group, workers) for group in groups)
        busy = compute + communication
        step = max(busy, data) if workers else busy + data
        before = self._statistics_seconds() / gpus
        micro_batches, memories, largest = [], [], []
        for group in groups:
            teachers = self._teacher_bytes(group)
            for cost, _, images in group:
                memory = functools.partial(self._memory, cost, gpus, accumulation, teachers)
                micro_batches.append(images)
                memories.append(memory(images))
                largest.append(self._largest(memory))
        return Scaled(
            gpus=gpus,
            micro_batches=tuple(micro_batches),
            accumulation=accumulation,
            memory=max(memories, key=lambda memory: memory.total),
            largest=tuple(largest),
            compute=compute,
            communication=communication,
            data=data,
            step=step,
            hours=(self._workload.recipe.run.steps * step + before) / 3600,
        )

    def _groups(self, gpus: int) -> list[list[_Placed]]:
        """Groups the arms that share ranks; a single process runs all."""
        groups: dict[str, list[ArmCost]] = {}
        for cost in self._costs:
            own = gpus > 1 and cost.arm.ranks is not None
            groups.setdefault(cost.arm.key if own else "", []).append(cost)
        whole = sum(group[0].arm.ranks or 1 for group in groups.values())
        placed = []
        for group in groups.values():
            own = len(groups) > 1
            ranks = (group[0].arm.ranks or 1) * gpus // whole if own else gpus
            if (own and gpus % whole) or any(c.arm.batch_size % ranks for c in group):
                self._workload.recipe.require_ranks(gpus)  # its message names numbers that divide
                raise RecipeError(f"--gpus {gpus}: the arms' batches do not divide over them")
            shares = [cost.arm.batch_size // ranks for cost in group]
            pairs = list(zip(group, shares, strict=True))
            placed.append([_Placed(c, s, _divisor(s, c.arm.micro_batch)) for c, s in pairs])
        return placed

    def _compute(self, group: Iterable[_Placed]) -> float:
        """Seconds of computation of one rank in a step."""
        flops: Counter[torch.dtype] = Counter()
        for cost, share, _ in group:
            images = cost.arm.share * share
            flops.update({d: round(n * images) for d, n in cost.trace.flops().items()})
        return self._speed.seconds(flops)

    def _teacher_bytes(self, group: Iterable[_Placed]) -> int:
        """Bytes of the teachers' weights on a rank that runs these arms."""
        names = {name for each in group for name in each.cost.arm.routes}
        return sum(num_bytes(self._workload.teachers[name]) for name in names)

    def _memory(
        self, cost: ArmCost, gpus: int, accumulation: float, teachers: int, images: int
    ) -> Memory:
        trace = cost.at(images)
        return self.sharding.memory(trace, gpus, accumulation=accumulation, teachers=teachers)

    def _largest(self, memory: Callable[[int], Memory]) -> int:
        """Images of the largest micro-batch that fits, by binary search."""
        room = self._speed.gpu.memory * GB * MEMORY_SHARE
        low, high = 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            fits = memory(middle).total <= room
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _statistics_seconds(self) -> float:
        """Seconds of the teachers' passes before the first step, at the first size, on one GPU."""
        flops: Counter[torch.dtype] = Counter()
        done: set[str] = set()
        for cost in self._costs:
            rows = self._workload.rows(cost.arm)
            names = {r.component for r in rows if r.component.split("/")[0] in cost.arm.routes}
            if new := names - done:
                flops.update(cost.trace.flops(*new))
                done |= new
        images = self._workload.statistics_images
        return self._speed.seconds({dtype: images * each for dtype, each in flops.items()})


def _reading(group: Iterable[_Placed], workers: int) -> float:
    return sum(
        reading_seconds(cost.arm.share * share, cost.arm.resolution, workers)
        for cost, share, _ in group
    )


def _divisor(share: int, most: int) -> int:
    """The largest divisor of `share` that is at most `most`."""
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def _line(at: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
