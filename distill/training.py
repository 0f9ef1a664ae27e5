"""What the training commands share: a run from its recipe to its last checkpoint.

`train_student` and `train_upsampler` say how their task is put together; starting, resuming,
saving, stopping and failing are the same for both. Exit codes: 0 done, or stopped on request after
saving (`STATUS.json` tells which); 2 a mistake in the recipe; 1 anything else.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from data.stream import TrainStream, merge_states
from distill import distributed
from distill.checkpoint import read_manifest, restore_latest, save_checkpoint
from distill.config import dump_yaml
from distill.evaluation.during_training import TrainingBenchmarks
from distill.files import write_text
from distill.generators import generator_states, restore_generators
from distill.loop import Loop, NonFiniteError, Outcome, Plan, Task
from distill.process import (
    StopRequest,
    arm_watchdog,
    die_with_launcher,
    disarm_watchdog,
    importing,
)
from distill.run_folder import make_run_folder, open_run_folder, versions, write_status
from distill.tracking import Tracker, log
from distill.training_recipe import TrainingRecipe, resolved

R = TypeVar("R", bound=TrainingRecipe, contravariant=True)


class Assembly(NamedTuple):
    """What a run trains, and on what.

    Attributes:
        task: with its engine.
        stream: the images of the training steps.
        benchmarks: what is measured on the way; None for nothing.
    """

    task: Task
    stream: TrainStream
    benchmarks: TrainingBenchmarks | None = None


class Assemble(Protocol[R]):
    """Builds everything that a recipe names."""

    def __call__(self, recipe: R, micro_batch: int) -> Assembly:
        """Called by every rank, with the images of one forward pass on this rank."""


def run_command(
    module: str,
    description: str,
    load: Callable[[Path, list[str]], R],
    assemble: Assemble[R],
) -> None:
    """The body of a training command.

    Args:
        module: as the user types it, `distill.train_student`.
        description: for `--help`.
        load: reads a recipe's file and applies overrides.
        assemble: builds the task and opens the stream.
    """
    arguments = _parse(module, description)
    with importing():  # the libraries of the teachers that the recipe names
        recipe = load(arguments.recipe, arguments.overrides)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)
    if distributed.rank() == 0:
        print(dump_yaml(resolved(recipe)), flush=True)
    if arguments.dry_run:
        return
    micro_batch = recipe.run.micro_batch(distributed.world_size())
    die_with_launcher()
    stop = StopRequest()
    arm_watchdog(recipe.run.watchdog_s)
    make_run_folder(recipe.run.dir)
    distributed.connect(recipe.run.watchdog_s, recipe.run.dir)
    try:
        outcome = _train(recipe, assemble, micro_batch, stop)
    except NonFiniteError as error:
        _fail(recipe, str(error))
    except BaseException as error:
        _note(recipe, "failed", error=f"{type(error).__name__}: {error}")
        raise
    _note(recipe, outcome)
    disarm_watchdog()
    distributed.disconnect(recipe.run.dir)


def open_stream(
    recipe: TrainingRecipe, resolution: tuple[int, int], micro_batch: int, *, purpose: str = ""
) -> TrainStream:
    """Opens a recipe's images.

    Args:
        recipe: the run's.
        resolution: (height, width) in pixels.
        micro_batch: images of one batch on this rank.
        purpose: another purpose sees the images in another order; empty for training.
    """
    run = recipe.run
    return TrainStream(
        recipe.data,
        resolution=resolution,
        batch_size=run.batch_size,
        micro_batch_size=micro_batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=distributed.derive_seed(run.seed, purpose) if purpose else run.seed,
        index_dir=run.dir / "index",
    )


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
        "--dry-run", action="store_true", help="print the resolved recipe, train nothing"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args()


def _train(recipe: R, assemble: Assemble[R], micro_batch: int, stop: StopRequest) -> Outcome:
    run = recipe.run
    _on_rank_0(lambda: open_run_folder(run.dir, resolved(recipe)))
    _note(recipe, "running")
    if recipe.engine.precision != "fp32" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    task, stream, benchmarks = assemble(recipe, micro_batch)
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
        plan = _plan(recipe, stream.micro_batches_per_step)
        loop = Loop(plan, task, tracker, session.save, stop, benchmarks)
        outcome = loop.run(stream.batches(), start_step)
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
        if manifest["world_size"] != distributed.world_size():
            raise ValueError(
                f"written by {manifest['world_size']} ranks, this run has "
                f"{distributed.world_size()}; start it with as many"
            )
        self._stream.restore(manifest["stream"])
        self._task.engine.load(folder)
        restore_generators(torch.load(folder / f"random_{distributed.rank()}.pt"))
        self.saved_step = manifest["step"]


def _plan(recipe: TrainingRecipe, accumulation: int) -> Plan:
    return Plan(
        folder=recipe.run.dir,
        seed=recipe.run.seed,
        steps=recipe.run.steps,
        accumulation=accumulation,
        batch_size=recipe.run.batch_size,
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
