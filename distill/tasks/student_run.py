"""Puts a student's run together: images, teachers, targets, student, engine, benchmarks."""

from distill.benchmarks.during_training import (
    TrainingBenchmarks,
    check_encoder,
    examine_data,
)
from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.engine.optimizer import decay_groups
from distill.objective.views import frame_size
from distill.parametrization.reparametrize import reparametrize
from distill.runtime import distributed
from distill.runtime.tracking import log
from distill.targets.source import LiveTargets, TargetSource
from distill.tasks.build import (
    build_student,
    build_targets,
    build_teachers,
    fingerprints_of,
    freeze_student,
    inherited_statistics,
    standardise_heads,
)
from distill.tasks.cached_targets import CachedTargets
from distill.tasks.route_table import route_rows, route_table
from distill.tasks.student_encoder import StudentEncoder
from distill.tasks.student_recipe import StudentRecipe, cells_of
from distill.tasks.student_task import StudentTask
from distill.training.arms import StepPlan
from distill.training.calibration import fit_statistics
from distill.training.session import Assembly
from teachers.messages import hushed
from teachers.teacher import Teacher
from teachers.weights import without_storage


def assemble(recipe: StudentRecipe) -> Assembly:
    """Builds everything that a student's run needs; every rank calls this."""
    # What is built, in which order, and why. Mistakes of the recipe appear before what takes long.
    # 1. The plan of the steps, the stream of images and the data of benchmarks: no model is loaded
    #    yet.
    # 2. The teachers, with weights on the ranks that run them only, or the cache in their place.
    # 3. The student. Its initial weights depend on run.seed alone, not on 1 and 2. Parts are
    #    frozen here, because the engine takes the parameters as they are.
    # 4. The statistics of the targets: inherited, read from the run's folder or estimated. Heads
    #    that started in their teachers' spaces follow them; then the student is reparametrised.
    # 5. The engine, which takes over the student's weights: from now on they are read through it.
    # 6. The task, whose objective needs the dispersions of 4; and benchmarks of its student.
    # Then the session restores the newest checkpoint: weights, optimiser, statistics and position.
    run, objective = recipe.run, recipe.objective
    margin = frame_size(objective.equivariance, (0, 0), recipe.student.patch_size)[0]
    plan = recipe.step_plan(distributed.world_size(), margin=margin)
    stream = recipe.open_stream(plan)
    if recipe.benchmarks is not None:
        examine_data(recipe.benchmarks, run.dir)
    teachers, targets = _build_teachers_and_targets(recipe, plan)
    with hushed(distributed.rank() > 0):
        student = build_student(recipe, teachers)
    if recipe.benchmarks is not None:
        size = recipe.largest_resolution
        check_encoder(recipe.benchmarks, StudentEncoder(without_storage(student), resolution=size))
    freeze_student(student, recipe, teachers)
    fingerprints = fingerprints_of(targets)
    if isinstance(targets, LiveTargets) and objective.needs_statistics:
        cells = cells_of(recipe.student)
        facts: dict[str, object] = {f"student_{k}".removesuffix("_size"): cells[k] for k in cells}
        facts["routes"] = {name: arm.routes for name, arm in recipe.placed_arms.items()}
        without_margin = recipe.step_plan(distributed.world_size())
        count = recipe.targets.statistics_images
        inherited = inherited_statistics(recipe, fingerprints)
        fit_statistics(recipe, targets, without_margin, count, facts, inherited)
    standardise_heads(student, targets.statistics)
    reparametrize(student, recipe.reparametrisation)
    engine = DeepSpeedEngine(
        student,
        recipe.engine,
        recipe.optimizer,
        decay_groups(student, recipe.optimizer, student.no_weight_decay()),
        micro_batch_size=plan.micro_batches(distributed.rank(), 0)[0].images,
        whole_average=objective.mesa is not None,
    )
    task = StudentTask(recipe, student, engine, targets)
    benchmarks = None
    if recipe.benchmarks is not None:
        benchmarks = TrainingBenchmarks(recipe.benchmarks, task.encoder, run.dir, run.steps)
    named = {f"teachers.{name}": value for name, value in fingerprints.items()}
    return Assembly(task, stream, plan, named, benchmarks)


def _build_teachers_and_targets(
    recipe: StudentRecipe, plan: StepPlan
) -> tuple[dict[str, Teacher], TargetSource]:
    placement = recipe.targets.placement
    mine = set() if recipe.targets.cached else plan.teachers_of(distributed.rank())
    rank = distributed.rank()
    with distributed.first_on_its_node(), hushed(rank > 0 and mine <= plan.teachers_of(0)):
        teachers = build_teachers(recipe, mine, in_host=placement)
    log.info("%s", route_table(route_rows(recipe, teachers)))
    if recipe.targets.cached:
        return teachers, CachedTargets(recipe, teachers)
    targets = build_targets(recipe, teachers, mine)
    if placement:
        targets.ensemble.place(placement, distributed.peers_among(plan.partitions))
    return teachers, targets


def preview(recipe: StudentRecipe) -> str:
    """The table of the teachers' routes, without weights; for a dry run.

    Raises:
        RecipeError: the run would refuse the teachers or their cache.
        DataError: the run would refuse the data of its benchmarks.
    """
    if recipe.benchmarks is not None:
        examine_data(recipe.benchmarks, None)
    teachers = build_teachers(recipe, set())
    build_targets(recipe, teachers, set())
    if recipe.targets.cached:
        CachedTargets(recipe, teachers)
    return route_table(route_rows(recipe, teachers))
