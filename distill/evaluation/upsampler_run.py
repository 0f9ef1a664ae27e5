"""Measures the upsampler of a training run."""

from pathlib import Path
from typing import Any

from distill.evaluation.comparison import compare
from distill.runtime.errors import RecipeError
from distill.tasks.trained import find_run, recipe_file
from distill.tasks.upsampler_recipe import load_upsampler_recipe


def evaluate_upsampler(target: Path, overrides: list[str]) -> tuple[list[dict[str, Any]], Path]:
    """Measures the upsampler of a run's newest whole checkpoint.

    Args:
        target: a recipe of `train_upsampler`, the folder of a run, or one of its checkpoints.
        overrides: `section.key=value` changes to the recipe.

    Returns:
        The lines of `fidelity.jsonl`, and the run's folder `evaluation` that holds it and pictures.

    Raises:
        RecipeError: the recipe has no section `evaluation`, its images are not there, or the run
            has no whole checkpoint.
    """
    recipe = load_upsampler_recipe(recipe_file(target), overrides)
    if recipe.evaluation is None:
        raise RecipeError(
            "evaluation: the recipe has no such section; add evaluation.images=FOLDER to the "
            "command"
        )
    run, checkpoint = find_run(target, recipe.run.dir)
    folder = run / "evaluation"
    methods = {recipe.upsampler.kind: [checkpoint]}
    return compare(recipe.teacher, methods, recipe.evaluation, folder), folder
