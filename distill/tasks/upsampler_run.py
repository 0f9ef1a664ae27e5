"""Puts an upsampler's run together: its teacher, PHI-S, images, trained module and engine."""

import torch

from distill.engine.deepspeed_engine import DeepSpeedEngine
from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS, RecipeError
from distill.runtime.tracking import log
from distill.targets.ensemble import Ensemble
from distill.targets.source import LiveTargets
from distill.targets.target_statistics import Statistics
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.tasks.upsampler_task import UpsamplerTask, build_multi_view, parameter_groups
from distill.training.arms import StepPlan
from distill.training.calibration import fit_statistics
from distill.training.session import Assembly
from teachers.build import TEACHERS, build_teacher
from teachers.catalog import licence_of
from teachers.compiled import compile_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.messages import hushed
from teachers.phi_s import PhiS
from teachers.teacher import Teacher
from teachers.upsamplers.build import build_upsampler
from teachers.upsamplers.standardised import Standardised

NAME = "teacher"  # in the statistics


def assemble(recipe: UpsamplerRecipe) -> Assembly:
    """Builds everything that an upsampler's run needs; every rank calls this."""
    # What is built, in which order, and why:
    # 1. The teacher: the size of the images follows from its spec and the upsampler's factor.
    # 2. The plan of the steps and the stream of images of that size.
    # 3. PHI-S of the teacher's maps, read from the run's folder or estimated.
    # 4. The trained module, which standardises by PHI-S; its weights depend on run.seed alone.
    # 5. The engine, which takes over the module's weights.
    # Then the session restores the newest checkpoint: weights, optimiser and position.
    with distributed.first_on_its_node(), hushed(distributed.rank() > 0):
        teacher, fingerprint = build_encoder(recipe)
    resolution = base_resolution(recipe, teacher.spec)
    plan = recipe.step_plan(resolution, NAME, distributed.world_size())
    stream = recipe.open_stream(plan)
    module = build_multi_view(recipe, teacher, fit_phi_s_of(recipe, teacher, plan))
    engine = DeepSpeedEngine(
        module,
        recipe.engine,
        recipe.optimizer,
        parameter_groups(module, recipe),
        micro_batch_size=plan.micro_batches(distributed.rank(), 0)[0].images,
    )
    task = UpsamplerTask(recipe, module, engine, teacher, fingerprint)
    return Assembly(task, stream, plan, {"teacher": fingerprint})


def base_resolution(recipe: UpsamplerRecipe, spec: FeatureSpec) -> tuple[int, int]:
    """(height, width) in pixels of the images that views are made from: all that tiles can see.

    Raises:
        RecipeError: the upsampler cannot be built for this encoder, or cannot be trained.
    """
    try:
        with torch.device("meta"):  # only for its size
            inner = build_upsampler(recipe.upsampler, spec)
            return Standardised(inner, PhiS(spec.spatial_dim)).resolution
    except TeacherError as error:
        raise RecipeError(f"upsampler: {error}") from error


def build_encoder(recipe: UpsamplerRecipe) -> tuple[Teacher, str]:
    """The teacher in the recipe's precision, and its fingerprint in float32."""
    try:
        teacher = build_teacher(recipe.teacher, device=distributed.device())
        fingerprint = teacher_fingerprint(teacher)
        if recipe.targets.precision == "bf16":
            teacher.cast(torch.bfloat16)
        if not TEACHERS.is_built_in(recipe.teacher.kind):
            dry_run(teacher)
        log.info("teacher: %s", licence_of(recipe.teacher))
    except USER_ERRORS as error:
        raise RecipeError(f"teacher: {error}") from error
    if recipe.targets.compile:
        compile_teacher(teacher)
    return teacher, fingerprint


def fit_phi_s_of(recipe: UpsamplerRecipe, teacher: Teacher, plan: StepPlan) -> PhiS:
    """PHI-S of the encoder's maps at its native resolution."""
    targets = LiveTargets(Ensemble({NAME: teacher}, student_patch=None), Statistics())
    fit_statistics(recipe, targets, plan, recipe.targets.statistics_images, {"of": "native"})
    return targets.statistics.of[NAME].phi_s
