"""How a recipe runs on so many GPUs: its micro-batches, memory, time, and what limits it."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from distill.engine.optimizer import flat_size
from distill.planning.machine import GB, MEMORY_SHARE, Speed, link_seconds, reading_seconds
from distill.planning.memory import Memory, Sharding
from distill.planning.step import Arm, Trace, Workload, count
from distill.runtime.errors import RecipeError


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
    """One optimiser step on so many GPUs, on average over the sizes of its images.

    Attributes:
        gpus: how many.
        micro_batches: images of a forward pass on a rank, for each arm.
        accumulation: micro-batches of a step on a rank.
        memory: of the fullest rank.
        largest: micro-batches that would fit, for each arm; 0 where not even one image does.
        compute: seconds of the slowest rank.
        communication: seconds, after the computation as the engine does not overlap them.
        data: seconds of reading, beside both where a rank has workers.
        step: seconds of all.
        hours: of all steps, and of the statistics before them.
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
        """What takes most of the time."""
        times = {
            "compute": self.compute,
            "communication": self.communication,
            "data": self.data,
        }
        return max(times, key=lambda name: times[name])


class _Placed(NamedTuple):
    """An arm on the ranks that run it."""

    cost: ArmCost
    share: int  # images of a step on a rank
    micro_batch: int

    @property
    def passes(self) -> float:
        """Of a rank in a step, on average."""
        return self.cost.arm.share * self.share / self.micro_batch


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
        speed: of the GPUs.
        device_type: `cpu` where the engine runs on one, whose flat tensors are smaller.
    """

    def __init__(
        self,
        workload: Workload,
        costs: list[ArmCost],
        speed: Speed,
        *,
        device_type: str = "cuda",
    ) -> None:
        self._workload, self._costs, self._speed = workload, costs, speed
        trained = [p for p in workload.trained.parameters() if p.requires_grad]
        self.sharding = Sharding(
            workload.recipe.engine,
            parameters=sum(p.numel() for p in trained),
            largest=flat_size(device_type),
            fixed=count(workload.trained)[1] - sum(p.numel() * p.element_size() for p in trained),
            whole_average=workload.whole_average,
        )

    def on(self, gpus: int) -> Scaled:
        """The step on so many GPUs.

        Raises:
            RecipeError: a batch, or the ranks of the arms, do not divide over them.
        """
        groups = self._groups(gpus)
        placed = [each for group in groups for each in group]
        accumulation = max(sum(each.passes for each in group) for group in groups)
        compute = max(self._compute(group) for group in groups)
        sent = self.sharding.sent(gpus, accumulation)
        communication = link_seconds(sent, self._speed.gpu, gpus)
        workers = self._workload.recipe.data.workers
        data = max(_reading(group, workers) for group in groups)
        busy = compute + communication
        step = max(busy, data) if workers else busy + data
        before = self._statistics_seconds() / gpus
        memories = [
            self._memory(each.cost, each.micro_batch, gpus, accumulation, group)
            for group in groups
            for each in group
        ]
        return Scaled(
            gpus=gpus,
            micro_batches=tuple(each.micro_batch for each in placed),
            accumulation=accumulation,
            memory=max(memories, key=lambda memory: memory.total),
            largest=tuple(
                self._largest(each.cost, gpus, accumulation, group)
                for group in groups
                for each in group
            ),
            compute=compute,
            communication=communication,
            data=data,
            step=step,
            hours=(self._workload.recipe.run.steps * step + before) / 3600,
        )

    def _groups(self, gpus: int) -> list[list[_Placed]]:
        """The arms that share ranks, together; one process runs all."""
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
                self._workload.recipe.require_ranks(gpus)  # says what divides
                raise RecipeError(f"--gpus {gpus}: the arms' batches do not divide over them")
            shares = [cost.arm.batch_size // ranks for cost in group]
            pairs = list(zip(group, shares, strict=True))
            placed.append([_Placed(c, s, _divisor(s, c.arm.micro_batch)) for c, s in pairs])
        return placed

    def _compute(self, group: Iterable[_Placed]) -> float:
        """Seconds of a rank's products in a step."""
        flops: Counter[torch.dtype] = Counter()
        for cost, share, _ in group:
            images = cost.arm.share * share
            flops.update({d: round(n * images) for d, n in cost.trace.flops().items()})
        return self._speed.seconds(flops)

    def _memory(
        self,
        cost: ArmCost,
        images: float,
        gpus: int,
        accumulation: float,
        group: Iterable[_Placed],
    ) -> Memory:
        names = {name for each in group for name in each.cost.arm.routes}
        return self.sharding.memory(
            cost.at(images),
            gpus,
            accumulation=accumulation,
            teachers=sum(count(self._workload.teachers[name])[1] for name in names),
        )

    def _largest(
        self, cost: ArmCost, gpus: int, accumulation: float, group: Iterable[_Placed]
    ) -> int:
        """Images of the largest micro-batch that fits, found by halving."""
        room = self._speed.gpu.memory * GB * MEMORY_SHARE
        low, high = 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._memory(cost, middle, gpus, accumulation, group).total <= room
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _statistics_seconds(self) -> float:
        """Of each teacher's passes before the first step, at its first size, on one GPU."""
        flops: Counter[torch.dtype] = Counter()
        done: set[str] = set()
        for cost in self._costs:
            rows = self._workload.rows(cost.arm)
            parts = {r.part for r in rows if r.part.split("/")[0] in cost.arm.routes} - done
            if parts:
                flops.update(cost.trace.flops(*parts))
                done |= parts
        images = self._workload.statistics_images
        return self._speed.seconds({dtype: images * each for dtype, each in flops.items()})


def _reading(group: Iterable[_Placed], workers: int) -> float:
    return sum(
        reading_seconds(cost.arm.share * share, cost.arm.resolution, workers)
        for cost, share, _ in group
    )


def _divisor(share: int, most: int) -> int:
    """The largest divisor of a share that is at most so many."""
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def _line(at: float, x0: float, y0: float, x1: float, y1: float) -> float:
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
