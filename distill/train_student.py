"""Trains a student: `deepspeed --module distill.train_student RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest whole checkpoint.
"""

from collections.abc import Iterator

from torch import Tensor

from distill import distributed
from distill.engine import Engine
from distill.equivariance import frame_size
from distill.errors import command
from distill.evaluation.during_training import TrainingBenchmarks
from distill.optimizer import decay_groups
from distill.process import arm_watchdog
from distill.recipe import StudentRecipe, load_student_recipe
from distill.student_task import (
    StudentTask,
    build_student,
    build_targets,
    build_teachers,
    prepare_student,
)
from distill.targets import Targets
from distill.tracking import log
from distill.training import Assembly, open_stream, run_command


@command
def main() -> None:
    """The command."""
    run_command(
        "distill.train_student",
        "Train a student from several frozen teachers.",
        load_student_recipe,
        assemble,
    )


def assemble(recipe: StudentRecipe, micro_batch: int) -> Assembly:
    """Builds teachers, their targets and the student, and opens the images."""
    run, objective = recipe.run, recipe.objective
    size = frame_size(objective.equivariance, run.resolution, recipe.student.patch_size)
    stream = open_stream(recipe, size, micro_batch)
    teachers = build_teachers(recipe)
    targets = build_targets(recipe, teachers)
    _fit(recipe, targets, micro_batch)
    student = build_student(recipe, teachers)
    prepare_student(student, recipe, teachers)
    groups = decay_groups(student, recipe.optimizer, student.no_weight_decay())
    engine = Engine(
        student,
        recipe.engine,
        recipe.optimizer,
        groups,
        micro_batch_size=micro_batch,
        whole_average=objective.mesa is not None,
    )
    task = StudentTask(recipe, student, engine, targets)
    benchmarks = None
    if recipe.benchmarks is not None:
        benchmarks = TrainingBenchmarks(recipe.benchmarks, task.encoder, run.dir, run.steps)
    return Assembly(task, stream, benchmarks)


def _fit(recipe: StudentRecipe, targets: Targets, micro_batch: int) -> None:
    """Estimates what standardises the targets, over images in an order of its own."""
    if recipe.objective.standardisation == "none" and recipe.objective.summary != "angle":
        return
    run, count = recipe.run, recipe.targets.statistics_images
    stream = open_stream(recipe, run.resolution, micro_batch, purpose="statistics")
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


if __name__ == "__main__":
    main()
