"""The training loop: next batch, loss, optimiser step, metrics, checkpoint.

It is the same for everything that is trained: a `Task` turns a micro-batch of images into a loss.
Everything random is seeded from (seed, purpose, step, place in the step), so that a resumed run
repeats and misses nothing. Nothing depends on wall time, and checkpoints are written between two
steps only.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from data.batch import Batch
from distill.engine.engine import Engine, StepResult
from distill.engine.schedule import scheduled_ratio
from distill.objective.objective import LossTerms
from distill.runtime import distributed, timing
from distill.runtime.process import watchdog
from distill.runtime.stopping import StopRequest, interruptible
from distill.runtime.tracking import Tracker, log
from distill.training.arms import MicroBatch, StepPlan
from distill.training.speed import SpeedMeter
from distill.training.training_recipe import TrainingRecipe

Outcome = Literal["done", "preempted"]
LEFT_OUT = "non_finite/"  # prefix of metrics that count the losses that a task has left out
_MAX_SKIPPED = 20  # fp16 halves its loss scale at each: from 2^16 it has come to 2^-4 by then


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
        """Writes what a resumed run needs besides the engine; every rank calls this."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote; every rank calls this."""

    def draw(self, images: Tensor, micro_batch: MicroBatch, path: Path) -> None:
        """Draws the progress on a micro-batch; every rank calls this, rank 0 writes the file."""


class Benchmarks(Protocol):
    """Measurements during training; every rank calls both methods."""

    def due(self, step: int) -> list[str]:
        """The names of the benchmarks to run after a step."""

    def measure(self, names: Sequence[str], step: int, tracker: Tracker) -> None:
        """Runs benchmarks, changes nothing, and hands their metrics to the tracker."""


class Loop:
    """Trains a task.

    Args:
        recipe: the run's.
        plan: the micro-batches of each step.
        task: what is trained.
        tracker: gets the metrics.
        save: writes the checkpoint of a step; every rank calls it after that step.
        stop: becomes true when the process is asked to end.
        benchmarks: measured during training; None for none.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        plan: StepPlan,
        task: Task,
        tracker: Tracker,
        save: Callable[[int], None],
        stop: StopRequest,
        benchmarks: Benchmarks | None = None,
    ) -> None:
        self._recipe, self._plan, self._task, self._tracker = recipe, plan, task, tracker
        self._save, self._stop, self._benchmarks = save, stop, benchmarks
        self._device = distributed.device()
        self._skipped = self._images = 0
        self._seen: set[tuple[int, tuple[int, int]]] = set()  # sizes of the steps, by arm

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
            self._meter = SpeedMeter(clock)
            return self._run(batches, start_step, start_images)

    def _run(self, batches: Iterator[Batch], start_step: int, start_images: int) -> Outcome:
        steps, every = self._recipe.run.steps, self._recipe.checkpoint.every
        self._images = start_images
        self._measure(self._due(start_step), start_step)
        for step in range(start_step, steps):
            # Until the first step is done there is nothing new to save.
            first = interruptible() if step == start_step else nullcontext()
            with first, watchdog(self._limit(step)):
                stopping, last, report = self._step(step, batches)
            report()  # only of a step that no request can undo any more
            done = step + 1
            self._draw(done, *last)
            due = self._due(done)
            if done % every == 0 or done == steps or stopping or due:
                self._save(done)
                self._meter.restart()
            if stopping and done < steps:
                return "preempted"
            self._measure(due, done)
        return "done"

    def _limit(self, step: int) -> float | None:
        """Seconds that a step may take; None where kernels compile, at the first of a size.

        The sizes of all ranks count, as each of them waits for the others.
        """
        sizes = {(n, sub.resolution) for n, sub in enumerate(self._plan.layout.sub_batches(step))}
        new = sizes - self._seen
        self._seen |= sizes
        return None if new and self._recipe.compiles else self._recipe.run.watchdog_s

    def _due(self, step: int) -> list[str]:
        return [] if self._benchmarks is None else self._benchmarks.due(step)

    def _measure(self, names: Sequence[str], step: int) -> None:
        """Runs the benchmarks of a step, for any time.

        They come after the checkpoint: a run that is stopped or killed meanwhile loses no step, and
        measures when it is resumed.
        """
        if self._benchmarks is None or not names:
            return
        with interruptible(), self._tracker.paused():
            self._benchmarks.measure(names, step, self._tracker)
        self._meter.restart()

    def _step(
        self, step: int, batches: Iterator[Batch]
    ) -> tuple[bool, tuple[Tensor, MicroBatch], Callable[[], None]]:
        """One optimiser step.

        Returns:
            Whether any rank was asked to stop; the last micro-batch; and what reports the step.
        """
        recipe, keys = self._recipe, []
        sums: dict[str, Tensor] = {}
        for micro_batch in self._plan.micro_batches(distributed.rank(), step):
            with timing.timed("data"):
                batch = next(batches)
            micro_batch = micro_batch._replace(keys=batch.keys)
            keys += batch.keys
            images = batch.pixels(self._device)
            # By the images' place in the step, so that the random numbers of an image from local
            # shards do not depend on its rank.
            seeds = recipe.run.seed, "forward", step, micro_batch.first
            distributed.seed_default_generators(*seeds)
            with timing.timed("student"):
                terms = self._task.loss(images, micro_batch)
                # The engine takes the mean over the ranks; the shares of all of them sum to 1.
                self._task.engine.backward(terms.total * distributed.world_size())
            losses = {f"loss/{name}": value for name, value in terms.losses.items()}
            named = {"loss": terms.total.detach(), **losses, **terms.metrics}
            for name, value in named.items():
                sums[name] = sums.get(name, 0) + value
        values, stopping = self._share(step, sums, keys)
        lr = recipe.optimizer.lr * scheduled_ratio(recipe.schedule, step, recipe.run.steps)
        with timing.timed("optimizer"):
            result = self._task.engine.step(lr)
        self._check_gradient(step, result, keys)
        return stopping, (images, micro_batch), partial(self._report, step, values, lr, result)

    def _share(
        self, step: int, sums: Mapping[str, Tensor], keys: list[str]
    ) -> tuple[dict[str, float], bool]:
        """Sums over the ranks, and whether any was asked to stop, in one collective."""
        values = torch.stack([v.double() for v in sums.values()])
        finite = bool(values.isfinite().all())
        flag = torch.tensor([float(bool(self._stop))], dtype=torch.float64, device=values.device)
        shared = distributed.all_reduce(torch.cat([values, flag])).tolist()
        totals = dict(zip(sums, shared, strict=False))
        if not all(map(math.isfinite, totals.values())):
            bad = [] if finite else [n for n, v in sums.items() if not v.isfinite()]
            self._give_up(step, bad, keys)
        if any(value for name, value in totals.items() if name.startswith(LEFT_OUT)):
            own = [name for name, value in sums.items() if name.startswith(LEFT_OUT) and value]
            lines = _by_rank([name.removeprefix(LEFT_OUT) for name in own], keys)
            log.warning("step %d: losses not finite, so left out:\n%s", step, lines)
        return totals, shared[-1] > 0

    def _check_gradient(self, step: int, result: StepResult, keys: list[str]) -> None:
        """Ends the run at a gradient that is not finite, unless fp16 may lower its loss scale."""
        if not result.skipped:
            self._skipped = 0
            return
        self._skipped += 1
        log.warning("step %d: gradient not finite, weights not updated", step)
        if self._recipe.engine.precision != "fp16" or self._skipped >= _MAX_SKIPPED:
            self._give_up(step, ["gradient"], keys)

    def _give_up(self, step: int, bad: list[str], keys: list[str]) -> None:
        """Raises on every rank, naming the ranks, the losses and the keys of their images."""
        lines = _by_rank(bad, keys)
        raise NonFiniteError(f"step {step}: not finite, so the run stops:\n{lines}")

    def _report(self, step: int, sums: dict[str, float], lr: float, result: StepResult) -> None:
        meter, done = self._meter, step + 1
        images = self._plan.layout.num_samples(step)
        meter.images += images
        self._images += images
        self._tracker.advance(done, sums["loss"])
        if done % self._recipe.tracking.every and done != self._recipe.run.steps:
            return
        values = {**sums, "lr": lr, "grad_norm": result.grad_norm}
        values["loss_scale"] = result.loss_scale
        values |= {"images": float(self._images), **meter.read()}
        self._tracker.training_metrics(done, values)
        meter.restart()

    def _draw(self, step: int, images: Tensor, micro_batch: MicroBatch) -> None:
        """Draws a micro-batch after every `tracking.pictures_every` steps."""
        every = self._recipe.tracking.pictures_every
        if not every or step % every:
            return
        path = self._recipe.run.dir / "pictures" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        self._task.draw(images, micro_batch, path)
        self._tracker.picture(step, "features", path)
        self._meter.restart()


def _by_rank(bad: list[str], keys: list[str]) -> str:
    """A line for each rank where something was not finite; every rank must call this."""
    found = distributed.gather_objects((bad, keys))
    return "\n".join(
        f"  rank {rank}: {', '.join(names)}; keys: {', '.join(seen)}"
        for rank, (names, seen) in enumerate(found)
        if names
    )
