"""Trains a student: `deepspeed --module distill.train_student RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest whole checkpoint. Exit codes: 0 done,
or stopped on request after saving (`STATUS.json` tells which); 2 a mistake in the recipe; 1
anything else.
"""

import argparse
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from data.stream import TrainStream, merge_states
from distill import distributed
from distill.checkpoint import restore_latest, save_checkpoint
from distill.config import dump_yaml
from distill.engine import Engine
from distill.errors import command
from distill.files import write_text
from distill.loop import Loop, NonFiniteError, Outcome, Plan
from distill.optimizer import decay_groups
from distill.process import StopRequest, arm_watchdog, die_with_launcher, disarm_watchdog
from distill.recipe import StudentRecipe, load_student_recipe, resolved
from distill.run_folder import make_run_folder, open_run_folder, versions, write_status
from distill.student_task import StudentTask, build_student, build_targets, build_teachers
from distill.targets import Targets
from distill.tracking import Tracker, log


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="deepspeed --module distill.train_student",
        description="Train a student from several frozen teachers. A run that was stopped goes on "
        "from its newest whole checkpoint when started again with the same run.dir.",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, see recipes/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as run.steps=20 teachers.clip.chunk_size=8",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, train nothing"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it
    return parser.parse_intermixed_args(arguments)


@command
def main() -> None:
    """The command."""
    arguments = parse_arguments()
    recipe = load_student_recipe(arguments.recipe, arguments.overrides)
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
        outcome = train(recipe, micro_batch, stop)
    except NonFiniteError as error:
        _fail(recipe, str(error))
    except BaseException as error:
        _note(recipe, "failed", error=f"{type(error).__name__}: {error}")
        raise
    _note(recipe, outcome)
    disarm_watchdog()
    distributed.disconnect(recipe.run.dir)


def train(recipe: StudentRecipe, micro_batch: int, stop: StopRequest) -> Outcome:
    """Builds everything a recipe names, resumes where it can, and trains.

    Args:
        recipe: the run's.
        micro_batch: images of one forward pass on this rank.
        stop: becomes true when the process is asked to end.
    """
    run = recipe.run
    _on_rank_0(lambda: open_run_folder(run.dir, resolved(recipe)))
    _note(recipe, "running")
    stream = _open_stream(recipe, micro_batch, run.seed)
    teachers = build_teachers(recipe)
    targets = build_targets(recipe, teachers)
    _fit(recipe, targets, micro_batch)
    student = build_student(recipe, teachers)
    engine = Engine(
        student,
        recipe.engine,
        recipe.optimizer,
        decay_groups(student, recipe.optimizer, student.no_weight_decay()),
        micro_batch_size=micro_batch,
    )
    task = StudentTask(recipe, student, engine, targets)
    session = _Session(recipe, engine, task, stream)
    start_step = session.restore()
    plan = _plan(recipe, stream.micro_batches_per_step)
    active = distributed.rank() == 0
    with Tracker(
        run.dir,
        recipe.tracking,
        resolved(recipe),
        num_steps=run.steps,
        start_step=start_step,
        active=active,
    ) as tracker:
        batches: Iterator[Batch] = stream.batches()
        outcome = Loop(plan, task, tracker, session.save, stop).run(batches, start_step)
    _on_rank_0(lambda: log.info("%s after step %d", outcome, session.saved_step))
    engine.close()
    return outcome


class _Session:
    """What a checkpoint of this run holds beside the engine and the task."""

    def __init__(
        self, recipe: StudentRecipe, engine: Engine, task: StudentTask, stream: TrainStream
    ) -> None:
        self._recipe, self._engine, self._task, self._stream = recipe, engine, task, stream
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
        self._engine.save(folder)
        self._task.save(folder)
        torch.save(_generator_states(), folder / f"random_{distributed.rank()}.pt")
        if distributed.rank() == 0:
            write_text(folder / "recipe.yaml", dump_yaml(resolved(self._recipe)))

    def _read(self, folder: Path) -> None:
        from distill.checkpoint import read_manifest

        manifest = read_manifest(folder)
        if manifest["world_size"] != distributed.world_size():
            raise ValueError(
                f"written by {manifest['world_size']} ranks, this run has "
                f"{distributed.world_size()}; start it with as many"
            )
        self._stream.restore(manifest["stream"])
        self._engine.load(folder)
        _restore_generators(torch.load(folder / f"random_{distributed.rank()}.pt"))
        self.saved_step = manifest["step"]


def _open_stream(recipe: StudentRecipe, micro_batch: int, seed: int) -> TrainStream:
    return TrainStream(
        recipe.data,
        resolution=recipe.run.resolution,
        batch_size=recipe.run.batch_size,
        micro_batch_size=micro_batch,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
        index_dir=recipe.run.dir / "index",
    )


def _fit(recipe: StudentRecipe, targets: Targets, micro_batch: int) -> None:
    """Estimates what standardises the targets, over images in an order of its own."""
    if recipe.objective.standardisation == "none" and recipe.objective.summary != "angle":
        return
    run, count = recipe.run, recipe.targets.statistics_images
    stream = _open_stream(recipe, micro_batch, distributed.derive_seed(run.seed, "statistics"))
    facts = {
        "stream": stream.state()["identity"],
        "images": count,
        "student_patch": recipe.student.patch_size,
    }

    def images() -> Iterator[Tensor]:
        for batch in stream.batches():
            arm_watchdog(run.watchdog_s)
            yield batch.images.to(distributed.device()).float() / 255

    outcome = targets.fit(images(), run.dir / "statistics", facts, count)
    log.info("statistics over %d images: %s", count, outcome)


def _plan(recipe: StudentRecipe, accumulation: int) -> Plan:
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


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _on_rank_0(action: Any) -> None:
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


def _note(recipe: StudentRecipe, status: Any, **facts: Any) -> None:
    if distributed.rank() == 0 and recipe.run.dir.is_dir():
        write_status(recipe.run.dir, status, **facts)


def _fail(recipe: StudentRecipe, message: str) -> None:
    """Ends every rank with one message; their exit code is 1."""
    _note(recipe, "failed", error=message)
    if distributed.rank() == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
