"""The one training loop: next batch, loss, step, log, save; the same for everything trained here.

It knows no teacher and no student: a `Task` turns a micro-batch of images into a loss. Everything
random is seeded from (seed, purpose, step, place in the step), so a resumed run repeats nothing and
misses nothing. It does not schedule anything by wall time, and it saves only between two steps.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from data.batch import Batch
from distill.engine.engine import Engine, StepResult
from distill.engine.schedule import ScheduleConfig, scheduled_ratio
from distill.objective.objective import LossTerms
from distill.runtime import distributed, timing
from distill.runtime.process import StopRequest, arm_watchdog, disarm_watchdog
from distill.runtime.tracking import Tracker, log
from distill.training.arms import MicroBatch

Outcome = Literal["done", "preempted"]
LEFT_OUT = "non_finite/"  # a task's metrics of this prefix are above 0 where it left a loss out
_MAX_SKIPPED = 20  # fp16 halves its loss scale at each: 2^16 has reached 2^-4 by then


class NonFiniteError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message names the batch's keys."""


class Task(Protocol):
    """What the loop trains."""

    engine: Engine

    def loss(self, images: Tensor, micro_batch: MicroBatch) -> LossTerms:
        """What one micro-batch adds to the step's loss, with a graph through the engine.

        Args:
            images: (B, 3, H, W) in [0, 1].
            micro_batch: its shares of the losses. Every micro-batch of every rank returns the same
                loss names.
        """

    def save(self, folder: Path) -> None:
        """Writes what a resumed run needs beside the engine; called by every rank."""

    def load(self, folder: Path) -> None:
        """Goes back to what `save` wrote, the engine aside; called by every rank."""

    def draw(self, images: Tensor, micro_batch: MicroBatch, path: Path) -> None:
        """Draws a picture of the progress on the images of a micro-batch.

        Called by every rank; rank 0 writes the file.
        """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a loop runs, and how often it does what.

    Attributes:
        folder: the run's.
        seed: of everything random.
        steps: optimiser steps of the whole run.
        micro_batches: of this rank, as a function of the step's number.
        images: of a step, over all ranks.
        lr: peak learning rate.
        schedule: of the learning rate.
        log_every: steps between two lines of metrics.
        pictures_every: steps between two pictures; 0 draws none.
        save_every: steps between two checkpoints.
        watchdog_s: seconds a step may take.
        patient: whether a step with a non-finite gradient is left out and tried again with a
            smaller loss scale (fp16), instead of ending the run.
    """

    folder: Path
    seed: int
    steps: int
    micro_batches: Callable[[int], Sequence[MicroBatch]]
    images: Callable[[int], int]
    lr: float
    schedule: ScheduleConfig
    log_every: int
    pictures_every: int
    save_every: int
    watchdog_s: float
    patient: bool


class Saver(Protocol):
    """Writes a checkpoint of a step."""

    def __call__(self, step: int) -> None:
        """Called by every rank after optimiser step number `step`."""


class Benchmarks(Protocol):
    """Measures what is trained; every rank calls both."""

    def due(self, step: int) -> list[str]:
        """The names of what is to be measured after a step."""

    def measure(self, names: Sequence[str], step: int, tracker: Tracker) -> None:
        """Measures, changes nothing, and hands figures to the tracker."""


class Loop:
    """Trains a task.

    Args:
        plan: how long and how often.
        task: what is trained.
        tracker: where numbers go.
        save: writes a checkpoint.
        stop: becomes true when the process is asked to end.
        benchmarks: what is measured on the way; None for nothing.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        tracker: Tracker,
        save: Saver,
        stop: StopRequest,
        benchmarks: Benchmarks | None = None,
    ) -> None:
        self._plan, self._task, self._tracker = plan, task, tracker
        self._save, self._stop, self._benchmarks = save, stop, benchmarks
        self._device = distributed.device()
        self._skipped = self._images = 0

    def run(self, batches: Iterator[Batch], start_step: int, start_images: int) -> Outcome:
        """Trains from a step to the end, or until the process is asked to stop.

        Args:
            batches: this rank's micro-batches, from `start_step` on.
            start_step: optimiser steps done before.
            start_images: images that they read, over all ranks.

        Raises:
            NonFiniteError: a loss or gradient was NaN or infinite.
        """
        with timing.measured() as clock:
            self._meter = _Meter(clock)
            return self._run(batches, start_step, start_images)

    def _run(self, batches: Iterator[Batch], start_step: int, start_images: int) -> Outcome:
        plan = self._plan
        self._images = start_images
        self._measure(start_step)
        for step in range(start_step, plan.steps):
            arm_watchdog(plan.watchdog_s)
            stopping = self._step(step, batches)
            done = step + 1
            if done % plan.save_every == 0 or done == plan.steps or stopping:
                arm_watchdog(plan.watchdog_s)
                self._save(done)
                self._meter.restart()
            if stopping and done < plan.steps:
                return "preempted"
            self._measure(done)
        return "done"

    def _measure(self, step: int) -> None:
        """Runs the benchmarks that are due, without the watchdog: nobody knows how long they take.

        It comes after saving, and a resumed run does it again if it was cut off.
        """
        names = self._benchmarks.due(step) if self._benchmarks is not None else []
        if self._benchmarks is None or not names:
            return
        disarm_watchdog()
        with self._tracker.paused():
            self._benchmarks.measure(names, step, self._tracker)
        arm_watchdog(self._plan.watchdog_s)
        self._meter.restart()

    def _step(self, step: int, batches: Iterator[Batch]) -> bool:
        """One optimiser step; returns whether any rank was asked to stop."""
        plan, keys = self._plan, []
        sums: dict[str, Tensor] = {}
        for micro_batch in plan.micro_batches(step):
            with timing.timed("data"):
                batch = next(batches)
            micro_batch = micro_batch._replace(keys=batch.keys)
            keys += batch.keys
            images = batch.pixels(self._device)
            # By the images' place: of local shards, whichever rank they fall to, they meet the
            # same numbers.
            distributed.seed_default_generators(plan.seed, "forward", step, micro_batch.first)
            with timing.timed("student"):
                terms = self._task.loss(images, micro_batch)
                # The engine takes the mean over the ranks; the shares of all of them sum to 1.
                self._task.engine.backward(terms.total * distributed.world_size())
            for name, value in _named(terms).items():
                sums[name] = sums.get(name, 0) + value
        values, stopping = self._share(step, sums, keys)
        lr = plan.lr * scheduled_ratio(plan.schedule, step, plan.steps)
        with timing.timed("optimizer"):
            result = self._task.engine.step(lr)
        self._check_gradient(step, result, keys)
        self._report(step, values, lr, result)
        if plan.pictures_every and (step + 1) % plan.pictures_every == 0:
            self._draw(step + 1, images, micro_batch)
        return stopping

    def _share(
        self, step: int, sums: dict[str, Tensor], keys: list[str]
    ) -> tuple[dict[str, float], bool]:
        """Sums over the ranks, and whether any was asked to stop, in one collective."""
        values = torch.stack([v.double() for v in sums.values()])
        finite = bool(values.isfinite().all())
        flag = torch.tensor([float(bool(self._stop))], dtype=torch.float64, device=values.device)
        shared = distributed.all_reduce(torch.cat([values, flag])).tolist()
        totals = dict(zip(sums, shared, strict=False))
        if not all(map(_is_finite, totals.values())):
            bad = [] if finite else [n for n, v in sums.items() if not v.isfinite()]
            self._give_up(step, bad, keys)
        if any(value for name, value in totals.items() if name.startswith(LEFT_OUT)):
            self._warn(step, sums, keys)
        return totals, shared[-1] > 0

    def _warn(self, step: int, sums: dict[str, Tensor], keys: list[str]) -> None:
        """Says on rank 0 what the task left out on which rank, and of which keys."""
        bad = [n.removeprefix(LEFT_OUT) for n, v in sums.items() if n.startswith(LEFT_OUT) and v]
        log.warning("step %d: not finite, so left out:\n%s", step, _by_rank(bad, keys))

    def _check_gradient(self, step: int, result: StepResult, keys: list[str]) -> None:
        if not result.skipped:
            self._skipped = 0
            return
        self._skipped += 1
        log.warning("step %d: gradient not finite, step left out", step)
        if not self._plan.patient or self._skipped >= _MAX_SKIPPED:
            self._give_up(step, ["gradient"], keys)

    def _give_up(self, step: int, bad: list[str], keys: list[str]) -> None:
        """Raises on every rank, naming the ranks, the losses and the keys they saw."""
        lines = _by_rank(bad, keys)
        raise NonFiniteError(f"step {step}: not finite, so the run stops:\n{lines}")

    def _report(self, step: int, sums: dict[str, float], lr: float, result: StepResult) -> None:
        plan, meter, done = self._plan, self._meter, step + 1
        images = plan.images(step)
        meter.images += images
        self._images += images
        self._tracker.advance(done, sums["loss"])
        if done % plan.log_every and done != plan.steps:
            return
        values = {**sums, "lr": lr, "grad_norm": result.grad_norm}
        values["loss_scale"] = result.loss_scale
        values |= {"images": float(self._images), **meter.read()}
        self._tracker.training_metrics(done, values)
        meter.restart()

    def _draw(self, step: int, images: Tensor, micro_batch: MicroBatch) -> None:
        path = self._plan.folder / "pictures" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        self._task.draw(images, micro_batch, path)
        self._tracker.picture(step, "features", path)
        self._meter.restart()


class _Meter:
    """Speed, and where the time goes, since it was last restarted."""

    def __init__(self, clock: timing.Clock) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self.started, self.images = time.perf_counter(), 0
        self._clock.restart()

    def read(self) -> dict[str, float]:
        """Every rank must call this."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "images_per_s": self.images / seconds,
            "peak_memory_gb": _peak_memory() / 1e9,
            **timing.shares(distributed.gather_objects(self._clock.read())),
        }


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # Not ru_maxrss, which on Linux starts at the parent's peak.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return float(lines["VmHWM"].split()[0]) * 1024


def _named(terms: LossTerms) -> dict[str, Tensor]:
    """What a pass adds to the step's line of metrics."""
    parts = {f"loss/{name}": value for name, value in terms.parts.items()}
    return {"loss": terms.total.detach(), **parts, **terms.metrics}


def _by_rank(bad: list[str], keys: list[str]) -> str:
    """A line for each rank where something was wrong; every rank must call this."""
    found = distributed.gather_objects((bad, keys))
    return "\n".join(
        f"  rank {rank}: {', '.join(names)}; keys: {', '.join(seen)}"
        for rank, (names, seen) in enumerate(found)
        if names
    )


def _is_finite(value: float) -> bool:
    return value - value == 0
