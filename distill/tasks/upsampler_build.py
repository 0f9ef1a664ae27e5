"""From an upsampler's recipe to its teacher, that teacher's PHI-S and the image size."""

import torch

from distill.runtime import distributed
from distill.runtime.errors import USER_ERRORS, RecipeError
from distill.runtime.tracking import log
from distill.targets.targets import Targets
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from distill.training.arms import StepPlan
from distill.training.session import fit_targets
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
