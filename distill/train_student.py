"""Trains a student: `deepspeed --module distill.train_student RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest whole checkpoint.
"""

from distill.benchmarks.during_training import TrainingBenchmarks
from distill.engine.engine import Engine
from distill.engine.optimizer import decay_groups
from distill.objective.views import frame_size
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.tracking import log
from distill.targets.targets import Targets
from distill.tasks.build import (
    build_student,
    build_targets,
    build_teachers,
    inherited_statistics,
    prepare_student,
)
from distill.tasks.cached_targets import CachedTargets
from distill.tasks.kinds import register_kinds
from distill.tasks.route_table import route_rows, route_table
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from distill.tasks.student_task import StudentTask
from distill.training.arms import StepPlan
from distill.training.session import Assembly, fit_targets, open_stream, run_command
from teachers.teacher import Teacher


@command
def main() -> None:
    """The command."""
    register_kinds()
    run_command(
        "distill.train_student",
        "Train a student from several frozen teachers.",
        load_student_recipe,
        assemble,
        preview,
    )


def assemble(recipe: StudentRecipe) -> Assembly:
    """Builds teachers, their targets and the student, and opens the images."""
    run, objective = recipe.run, recipe.objective
    margin = frame_size(objective.equivariance, (0, 0), recipe.student.patch_size)[0]
    plan = recipe.step_plan(distributed.world_size(), margin=margin)
    stream = open_stream(recipe, plan)
    teachers, targets = build_taught(recipe, plan)
    # Before the statistics, which may take long: a file that does not fit is told at once.
    student = build_student(recipe, teachers)
    prepare_student(student, recipe, teachers)
    if recipe.targets.cached is None and (
        objective.standardisation != "none" or objective.summary == "angle"
    ):
        facts: dict[str, object] = {"student_patch": recipe.student.patch_size}
        facts["routes"] = {name: arm.routes for name, arm in recipe.placed_arms.items()}
        shown = recipe.step_plan(distributed.world_size())
        inherited = inherited_statistics(recipe)
        fit_targets(recipe, targets, shown, recipe.targets.statistics_images, facts, inherited)
    groups = decay_groups(student, recipe.optimizer, student.no_weight_decay())
    engine = Engine(
        student,
        recipe.engine,
        recipe.optimizer,
        groups,
        micro_batch_size=plan.micro_batches(distributed.rank(), 0)[0].images,
        whole_average=objective.mesa is not None,
    )
    task = StudentTask(recipe, student, engine, targets)
    benchmarks = None
    if recipe.benchmarks is not None:
        benchmarks = TrainingBenchmarks(recipe.benchmarks, task.encoder, run.dir, run.steps)
    return Assembly(task, stream, plan, benchmarks)


def build_taught(recipe: StudentRecipe, plan: StepPlan) -> tuple[dict[str, Teacher], Targets]:
    """The teachers, and what makes targets of them on this rank, or a cache in their place."""
    placement = recipe.targets.placement
    mine = set() if recipe.targets.cached else plan.teachers_of(distributed.rank())
    with distributed.first_on_its_node():
        teachers = build_teachers(recipe, mine, in_host=placement)
    log.info("%s", route_table(route_rows(recipe, teachers)))
    if recipe.targets.cached:
        return teachers, CachedTargets(recipe, teachers)
    targets = build_targets(recipe, teachers, mine)
    if placement:
        targets.place(placement, distributed.peers_among(plan.partitions))
    return teachers, targets


def preview(recipe: StudentRecipe) -> str:
    """How each teacher would be run, without weights; refuses what a run would refuse of them."""
    teachers = build_teachers(recipe, set())
    build_targets(recipe, teachers, set())
    if recipe.targets.cached:
        CachedTargets(recipe, teachers)
    return route_table(route_rows(recipe, teachers))


if __name__ == "__main__":
    main()
