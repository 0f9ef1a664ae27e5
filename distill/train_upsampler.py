"""Trains an upsampler: `deepspeed --module distill.train_upsampler RECIPE [key=value ...]`.

The same command starts a run and resumes it from its newest whole checkpoint, which holds the
upsampler as a file that a student's recipe can name.
"""

import torch

from distill.engine.engine import Engine
from distill.runtime import distributed
from distill.runtime.command import command
from distill.runtime.errors import USER_ERRORS, RecipeError
from distill.runtime.tracking import log
from distill.targets.targets import Targets
from distill.training.arms import StepPlan
from distill.training.session import Assembly, fit_targets, open_stream, run_command
from distill.upsampler_recipe import UpsamplerRecipe, load_upsampler_recipe
from distill.upsampler_task import UpsamplerTask, build_multi_view, parameter_groups
from teachers.build import TEACHERS, build_teacher
from teachers.catalog import licence_of
from teachers.compiled import compile_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.fingerprint import teacher_fingerprint
from teachers.phi_s import PhiS
from teachers.teacher import Teacher
from teachers.upsamplers.build import build_upsampler
from teachers.upsamplers.standardised import Standardised

NAME = "teacher"  # of its statistics


@command
def main() -> None:
    """The command."""
    run_command(
        "distill.train_upsampler",
        "Train an upsampler that makes one teacher's map denser.",
        load_upsampler_recipe,
        assemble,
    )


def assemble(recipe: UpsamplerRecipe) -> Assembly:
    """Builds the teacher and its upsampler, and opens the images at the size they need."""
    with distributed.first_on_its_node():
        teacher, fingerprint = build_encoder(recipe)
    resolution = base_resolution(recipe, teacher.spec)
    plan = recipe.step_plan(resolution, NAME, distributed.world_size())
    stream = open_stream(recipe, plan)
    phi_s = fit_phi_s_of(recipe, teacher, plan)
    module = build_multi_view(recipe, teacher, phi_s)
    engine = Engine(
        module,
        recipe.engine,
        recipe.optimizer,
        parameter_groups(module, recipe),
        micro_batch_size=plan.passes(distributed.rank(), 0)[0].images,
    )
    return Assembly(UpsamplerTask(recipe, module, engine, teacher, fingerprint), stream, plan)


def base_resolution(recipe: UpsamplerRecipe, spec: FeatureSpec) -> tuple[int, int]:
    """(height, width) in pixels of the images that views are made of: all that tiles can see.

    Raises:
        RecipeError: the upsampler cannot be built for this encoder, or not be trained.
    """
    try:
        with torch.device("meta"):  # only asked for its size
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
    """PHI-S of the encoder at its native resolution, over images in an order of its own."""
    targets = Targets({NAME: teacher}, student_patch=None)
    fit_targets(recipe, targets, plan, recipe.targets.statistics_images, {"of": "native"})
    return targets.statistics[NAME].phi_s


if __name__ == "__main__":
    main()
