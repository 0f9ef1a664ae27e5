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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from data.files import write_text
from data.stream import TrainStream, contents_of, merge_states
from data.text import printable
from distill.runtime import distributed
from distill.runtime.checkpoint import (
    find_checkpoints,
    read_manifest,
    restore_latest,
    save_checkpoint,
)
from distill.runtime.config import dump_yaml
from distill.runtime.generators import generator_states, restore_generators
from distill.runtime.last_message import print_last
from distill.runtime.process import die_with_launcher, importing
from distill.runtime.processor import require_alike, warn_of_slow_bf16
from distill.runtime.resuming import Change, Contents
from distill.runtime.run_folder import (
    confirm_run_folder,
    make_folder,
    open_run_folder,
    require_shared,
    versions,
    write_status,
)
from distill.runtime.stopping import Stopped, StopRequest, interruptible, listening
from distill.runtime.tracking import Tracker, log, start_logging
from distill.training.arms import StepPlan
from distill.training.loop import Benchmarks, Loop, NonFiniteError, Outcome, Task
from distill.training.training_recipe import TrainingRecipe, resolved

R = TypeVar("R", bound=TrainingRecipe)
T = TypeVar("T")


class Assembly(NamedTuple):
    """What a run trains, on which images, and how each step uses them.

    Attributes:
        task: what is trained.
        stream: of this rank's images.
        plan: the micro-batches of each step.
        fingerprints: key of each teacher in the recipe to its fingerprint; alike on all ranks.
        benchmarks: measured during training.
    """

    task: Task
    stream: TrainStream
    plan: StepPlan
    fingerprints: Mapping[str, str]
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
    with listening() as stop:
        with interruptible(), importing():  # the libraries of the teachers that the recipe names
            recipe = load(arguments.recipe, arguments.overrides)
        start_logging()
        if distributed.rank() == 0:
            print(dump_yaml(resolved(recipe)), flush=True)
        if not arguments.dry_run:
            _run(recipe, assemble, stop)
        elif preview is not None and distributed.rank() == 0:
            print(preview(recipe), flush=True)


def _run(recipe: R, assemble: Callable[[R], Assembly], stop: StopRequest) -> None:
    """Trains, and writes to the run's folder how that ended."""
    recipe.require_ranks(distributed.world_size())
    die_with_launcher()
    folder = recipe.run.dir
    make_folder(folder, "run.dir")
    stop.last_words = lambda: _write_stopped(folder)
    try:
        with interruptible():
            distributed.connect(recipe.run.ranks_wait_s, folder)
        outcome = _train(recipe, assemble, stop)
    except NonFiniteError as error:
        write_status(folder, "failed", error=str(error))
        if distributed.rank() == 0:
            print_last(f"error: {printable(error)}")
        os._exit(1)
    except BaseException as error:
        if not stop.ending and not isinstance(error, Stopped):
            message = f"{type(error).__name__}: {error}"
            distributed.announce_failure(message)
            write_status(folder, "failed", error=message)
        elif not _write_stopped(folder):
            sys.exit(1)
        raise
    write_status(folder, outcome)
    distributed.disconnect(folder)


def _write_stopped(folder: Path) -> bool:
    """Writes how a run ended that was asked to stop; whether it was no failure of another rank.

    The launcher asks all ranks to stop when one has failed.
    """
    failure = distributed.announced_failure()
    if failure is None:
        write_status(folder, "preempted")
    else:
        write_status(folder, "failed", error=failure)
    return failure is None


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
    run, plain, anyway = recipe.run, resolved(recipe), recipe.run.resume == "anyway"
    with interruptible():
        require_shared(run.dir)
        require_alike(distributed.gather_objects(recipe.precisions))
        found = _on_rank_0(lambda: open_run_folder(run.dir, plain, anyway=anyway))
        write_status(run.dir, "running")
        if recipe.engine.precision != "fp32" and torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")
        warn_of_slow_bf16(recipe.precisions)
        task, stream, plan, fingerprints, benchmarks = assemble(recipe)
        session = _Session(recipe, task, stream, {**stream.contents, **fingerprints})
        _on_rank_0(lambda: session.confirm(plain, found))
        start_step = session.restore()
    with Tracker(
        run.dir,
        recipe.tracking,
        plain,
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

    def __init__(
        self, recipe: TrainingRecipe, task: Task, stream: TrainStream, contents: Contents
    ) -> None:
        self._recipe, self._task, self._stream, self._contents = recipe, task, stream, contents
        self._root = recipe.run.dir / "checkpoints"
        self._anyway = recipe.run.resume == "anyway"
        self.saved_step = 0

    def confirm(self, recipe: dict[str, Any], found: Sequence[Change]) -> None:
        """Compares the contents of data and teachers with the newest checkpoint's; on rank 0."""
        then: Contents = {}
        step = 0
        for checkpoint in find_checkpoints(self._root)[:1]:
            manifest = read_manifest(checkpoint)
            step, stream = manifest["step"], contents_of(manifest["stream"])
            then = {**stream, **manifest.get("teachers", {})}
        both = then, self._contents
        folder, anyway = self._recipe.run.dir, self._anyway
        confirm_run_folder(folder, recipe, found, both, step=step, anyway=anyway)

    def save(self, step: int) -> None:
        """Writes the checkpoint of a step; every rank calls this."""
        states = distributed.gather_objects(self._stream.state())
        teachers = {k: v for k, v in self._contents.items() if k not in self._stream.contents}
        facts = {"versions": versions(), "stream": merge_states(states), "teachers": teachers}
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
        self._stream.restore(manifest["stream"], anyway=self._anyway)
        self._task.engine.load(folder, ranks=ranks)
        self._task.load(folder)
        # More ranks than before share the states: each micro-batch seeds the generators anyway.
        restore_generators(torch.load(folder / f"random_{distributed.rank() % ranks}.pt"))
        self.saved_step = manifest["step"]


def _on_rank_0(action: Callable[[], T]) -> T:
    """The result of an action on rank 0, on every rank; every rank raises its error."""
    result, error = None, None
    if distributed.rank() == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    result, error = distributed.broadcast_object((result, error))
    if error is not None:
        raise error
    return cast(T, result)
