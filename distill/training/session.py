"""A training run from its recipe to its last checkpoint, whatever it trains.

Starting, resuming, saving, stopping and failing are the same for `train_student` and
`train_upsampler`, which only put different tasks together. Exit codes: 0 done, or stopped on
request after saving (`STATUS.json` tells which); 2 a mistake in the recipe; 1 anything else.

The files of a run are listed in `distill.runtime.run_folder`, those of a checkpoint in
`distill.runtime.checkpoint`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from data.files import write_text
from data.stream import TrainStream, merge_states
from distill.runtime import distributed
from distill.runtime.checkpoint import read_manifest, restore_latest, save_checkpoint
from distill.runtime.config import dump_yaml
from distill.runtime.generators import generator_states, restore_generators
from distill.runtime.process import StopRequest, die_with_launcher, importing, watchdog
from distill.runtime.run_folder import (
    make_run_folder,
    open_run_folder,
    require_shared,
    versions,
    write_status,
)
from distill.runtime.tracking import Tracker, log, start_logging
from distill.training.arms import StepPlan
from distill.training.loop import Benchmarks, Loop, NonFiniteError, Outcome, Task
from distill.training.training_recipe import TrainingRecipe, resolved

R = TypeVar("R", bound=TrainingRecipe)


class Assembly(NamedTuple):
    """What a run trains, on which images, and how each step uses them."""

    task: Task
    stream: TrainStream
    plan: StepPlan
    benchmarks: Benchmarks | None = None


def run_command(
    module: str,
    description: str,
    load: Callable[[Path, list[str]], R],
    assemble: Callable[[R], Assembly],
    preview: Callable[[R], str] | None = None,
) -> None:
    """The body of a training command.

    Args:
        module: as the user types it, `distill.train_student`.
        description: for `--help`.
        load: reads a recipe's file and applies overrides.
        assemble: builds the task and opens the stream; every rank calls it.
        preview: what a dry run prints after the resolved recipe; None for nothing.
    """
    arguments = _parse(module, description)
    with importing():  # the libraries of the teachers that the recipe names
        recipe = load(arguments.recipe, arguments.overrides)
    start_logging()
    if distributed.rank() == 0:
        print(dump_yaml(resolved(recipe)), flush=True)
    if arguments.dry_run:
        if preview is not None and distributed.rank() == 0:
            print(preview(recipe), flush=True)
        return
    recipe.require_ranks(distributed.world_size())
    die_with_launcher()
    stop = StopRequest()
    with watchdog(recipe.run.watchdog_s):
        make_run_folder(recipe.run.dir)
        distributed.connect(recipe.run.watchdog_s, recipe.run.dir)
        try:
            outcome = _train(recipe, assemble, stop)
        except NonFiniteError as error:
            write_status(recipe.run.dir, "failed", error=str(error))
            if distributed.rank() == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
            write_status(recipe.run.dir, "failed", error=message)
            raise
        write_status(recipe.run.dir, outcome)
    distributed.disconnect(recipe.run.dir)


def _parse(module: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"deepspeed --module {module}",
        description=f"{description} A run that was stopped continues from its newest complete "
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
        help="print the resolved recipe, and for a student its teachers' routes; train nothing",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args()


def _train(recipe: R, assemble: Callable[[R], Assembly], stop: StopRequest) -> Outcome:
    run = recipe.run
    require_shared(run.dir)
    _on_rank_0(lambda: open_run_folder(run.dir, resolved(recipe)))
    write_status(run.dir, "running")
    if recipe.engine.precision != "fp32" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    task, stream, plan, benchmarks = assemble(recipe)
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
        loop = Loop(recipe, plan, task, tracker, session.save, stop, benchmarks)
        outcome = loop.run(stream.batches(), start_step, stream.num_read)
    log.info("%s after step %d", outcome, session.saved_step)
    task.engine.close()
    return outcome


class _Session:
    """Writes and reads the checkpoints of a run."""

    def __init__(self, recipe: TrainingRecipe, task: Task, stream: TrainStream) -> None:
        self._recipe, self._task, self._stream = recipe, task, stream
        self._root = recipe.run.dir / "checkpoints"
        self.saved_step = 0

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step; every rank calls this."""
        states = distributed.gather_objects(self._stream.state())
        facts = {"versions": versions(), "stream": merge_states(states)}
        save_checkpoint(self._root, step, self._write, facts, keep=self._recipe.checkpoint.keep)
        self.saved_step = step

    def restore(self) -> int:
        """Restores the newest complete checkpoint; returns its step, 0 if there is none."""
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
        # More ranks than before share the states: each micro-batch seeds the generators anyway.
        restore_generators(torch.load(folder / f"random_{distributed.rank() % ranks}.pt"))
        self.saved_step = manifest["step"]


def _on_rank_0(action: Callable[[], Any]) -> None:
    """Runs an action on rank 0; every rank raises its error."""
    error = None
    if distributed.rank() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    error = distributed.broadcast_object(error)
    if error is not None:
        raise error
