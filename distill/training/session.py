"""What the training commands share: a run from its recipe to its last checkpoint.

`train_student` and `train_upsampler` say how their task is put together; starting, resuming,
saving, stopping and failing are the same for both. Exit codes: 0 done, or stopped on request after
saving (`STATUS.json` tells which); 2 a mistake in the recipe; 1 anything else.
"""

import argparse
import contextlib
import functools
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from data.files import write_text
from data.stream import TrainStream, merge_states
from distill.runtime import distributed
from distill.runtime.checkpoint import read_manifest, restore_latest, save_checkpoint
from distill.runtime.config import dump_yaml
from distill.runtime.generators import generator_states, restore_generators
from distill.runtime.process import (
    StopRequest,
    arm_watchdog,
    die_with_launcher,
    disarm_watchdog,
    importing,
)
from distill.runtime.run_folder import (
    make_run_folder,
    open_run_folder,
    require_shared,
    versions,
    write_status,
)
from distill.runtime.tracking import Tracker, log
from distill.targets.target_statistics import TargetStatistics
from distill.targets.targets import CalibrationBatch, Targets
from distill.training.arms import StepPlan
from distill.training.loop import Benchmarks, Loop, NonFiniteError, Outcome, Plan, Task
from distill.training.training_recipe import TrainingRecipe, resolved

R = TypeVar("R", bound=TrainingRecipe, contravariant=True)


class Assembly(NamedTuple):
    """What a run trains, and on what.

    Attributes:
        task: with its engine.
        stream: the images of the training steps.
        plan: what each step does with them.
        benchmarks: what is measured on the way; None for nothing.
    """

    task: Task
    stream: TrainStream
    plan: StepPlan
    benchmarks: Benchmarks | None = None


class Assemble(Protocol[R]):
    """Builds everything that a recipe names."""

    def __call__(self, recipe: R) -> Assembly:
        """Called by every rank."""


def run_command(
    module: str,
    description: str,
    load: Callable[[Path, list[str]], R],
    assemble: Assemble[R],
    preview: Callable[[R], str] | None = None,
) -> None:
    """The body of a training command.

    Args:
        module: as the user types it, `distill.train_student`.
        description: for `--help`.
        load: reads a recipe's file and applies overrides.
        assemble: builds the task and opens the stream.
        preview: what a dry run says beside the resolved recipe; None for nothing.
    """
    arguments = _parse(module, description)
    with importing():  # the libraries of the teachers that the recipe names
        recipe = load(arguments.recipe, arguments.overrides)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)
    if distributed.rank() == 0:
        print(dump_yaml(resolved(recipe)), flush=True)
    if arguments.dry_run:
        if preview is not None and distributed.rank() == 0:
            print(preview(recipe), flush=True)
        return
    recipe.require_ranks(distributed.world_size())
    die_with_launcher()
    stop = StopRequest()
    arm_watchdog(recipe.run.watchdog_s)
    make_run_folder(recipe.run.dir)
    distributed.connect(recipe.run.watchdog_s, recipe.run.dir)
    try:
        outcome = _train(recipe, assemble, stop)
    except NonFiniteError as error:
        _fail(recipe, str(error))
    except BaseException as error:
        _note(recipe, "failed", error=f"{type(error).__name__}: {error}")
        raise
    _note(recipe, outcome)
    disarm_watchdog()
    distributed.disconnect(recipe.run.dir)


def open_stream(recipe: TrainingRecipe, plan: StepPlan, *, purpose: str = "") -> TrainStream:
    """Opens a recipe's images.

    Args:
        recipe: the run's.
        plan: what each step reads.
        purpose: another purpose sees the images in another order; empty for training.
    """
    run = recipe.run
    return TrainStream(
        recipe.data,
        plan.layout,
        rank=distributed.rank(),
        seed=distributed.derive_seed(run.seed, purpose) if purpose else run.seed,
        index_dir=run.dir / "index",
    )


def fit_targets(
    recipe: TrainingRecipe,
    targets: Targets,
    plan: StepPlan,
    count: int,
    facts: dict[str, object],
    inherited: Mapping[str, TargetStatistics] | None = None,
) -> None:
    """Estimates what standardises the targets, over images in an order of its own.

    Args:
        recipe: the run's.
        targets: the teachers that this rank runs.
        plan: the sizes at which each teacher sees the images.
        count: images, over all ranks.
        facts: what the estimate depends on beside the images.
        inherited: what stands already, see `inherited_statistics`.
    """
    stream = open_stream(recipe, plan, purpose="statistics")
    facts = {"stream": stream.state()["identity"], "images": count, **facts}
    shown = _calibration_batches(stream, plan, recipe.run.watchdog_s)
    outcome = targets.fit(shown, recipe.run.dir / "statistics", facts, count, inherited)
    log.info("statistics over %d images: %s", count, outcome)


def _calibration_batches(
    stream: TrainStream, plan: StepPlan, watchdog_s: float
) -> Iterator[CalibrationBatch]:
    batches, before = stream.batches(), Counter[str]()
    for step in itertools.count():
        for micro_batch in plan.micro_batches(distributed.rank(), step):
            arm_watchdog(watchdog_s)
            images = next(batches).pixels(distributed.device())
            yield CalibrationBatch(images, micro_batch.routes, before.copy())
        before.update(plan.images_of(step))


def _parse(module: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"deepspeed --module {module}",
        description=f"{description} A run that was stopped goes on from its newest whole "
        "checkpoint when started again with the same run.dir.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see recipes/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as run.steps=20 optimizer.lr=1e-4",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, and a student's how each teacher is run; train nothing",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args()


def _train(recipe: R, assemble: Assemble[R], stop: StopRequest) -> Outcome:
    run = recipe.run
    require_shared(run.dir)
    _on_rank_0(lambda: open_run_folder(run.dir, resolved(recipe)))
    _note(recipe, "running")
    if recipe.engine.precision != "fp32" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    task, stream, steps, benchmarks = assemble(recipe)
    session = _Session(recipe, task, stream)
    start_step = session.restore()
    with Tracker(
        run.dir,
        recipe.tracking,
        resolved(recipe),
        num_steps=run.steps,
        start_step=start_step,
        active=distributed.rank() == 0,
    ) as tracker:
        plan = _plan(recipe, steps)
        loop = Loop(plan, task, tracker, session.save, stop, benchmarks)
        outcome = loop.run(stream.batches(), start_step, stream.num_read)
    _on_rank_0(lambda: log.info("%s after step %d", outcome, session.saved_step))
    task.engine.close()
    return outcome


class _Session:
    """What a checkpoint of this run holds beside the engine and the task."""

    def __init__(self, recipe: TrainingRecipe, task: Task, stream: TrainStream) -> None:
        self._recipe, self._task, self._stream = recipe, task, stream
        self._root = recipe.run.dir / "checkpoints"
        self.saved_step = 0

    def save(self, step: int) -> None:
        """Writes a whole checkpoint; every rank calls this."""
        states = distributed.gather_objects(self._stream.state())
        facts = {"versions": versions(), "stream": merge_states(states)}
        save_checkpoint(self._root, step, self._write, facts, keep=self._recipe.checkpoint.keep)
        self.saved_step = step

    def restore(self) -> int:
        """Goes to the newest whole checkpoint; returns the optimiser steps done before."""
        found = restore_latest(self._root, self._read)
        if found is not None:
            log.info("resumed from %s", found)
        return self.saved_step

    def _write(self, folder: Path) -> None:
        self._task.engine.save(folder)
        self._task.save(folder)
        torch.save(generator_states(), folder / f"random_{distributed.rank()}.pt")
        if distributed.rank() == 0:
            write_text(folder / "recipe.yaml", dump_yaml(resolved(self._recipe)))

    def _read(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        ranks = manifest["world_size"]
        self._stream.restore(manifest["stream"])
        self._task.engine.load(folder, ranks=ranks)
        self._task.load(folder)
        # Other ranks than before share the states: every pass seeds its own numbers in any case.
        restore_generators(torch.load(folder / f"random_{distributed.rank() % ranks}.pt"))
        self.saved_step = manifest["step"]


def _plan(recipe: TrainingRecipe, steps: StepPlan) -> Plan:
    return Plan(
        folder=recipe.run.dir,
        seed=recipe.run.seed,
        steps=recipe.run.steps,
        micro_batches=functools.partial(steps.micro_batches, distributed.rank()),
        images=steps.layout.num_samples,
        lr=recipe.optimizer.lr,
        schedule=recipe.schedule,
        log_every=recipe.tracking.every,
        pictures_every=recipe.tracking.pictures_every,
        save_every=recipe.checkpoint.every,
        watchdog_s=recipe.run.watchdog_s,
        patient=recipe.engine.precision == "fp16",
    )


def _on_rank_0(action: Callable[[], Any]) -> None:
    """Runs an action on rank 0; its error ends every rank."""
    error = None
    if distributed.rank() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    error = distributed.broadcast_object(error)
    if error is not None:
        raise error


def _note(recipe: TrainingRecipe, status: Any, **facts: Any) -> None:
    if distributed.rank() == 0 and recipe.run.dir.is_dir():
        with contextlib.suppress(OSError):  # a full disk has said so itself
            write_status(recipe.run.dir, status, **facts)


def _fail(recipe: TrainingRecipe, message: str) -> None:
    """Ends every rank with one message; their exit code is 1."""
    _note(recipe, "failed", error=message)
    if distributed.rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
