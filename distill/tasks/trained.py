"""From a recipe, a run or a checkpoint to the student trained there and its teachers' targets."""

from pathlib import Path
from typing import NamedTuple

from distill.runtime import distributed
from distill.runtime.checkpoint import find_checkpoint, read_manifest
from distill.runtime.errors import RecipeError
from distill.targets.target_statistics import IN_CHECKPOINT, load_statistics
from distill.targets.targets import Targets
from distill.tasks.build import build_student, build_targets, build_teachers
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from student.model import Student
from student.storage import load_student


class Trained(NamedTuple):
    """Where a trained student lies.

    Attributes:
        recipe: what it was trained with.
        run: the run's folder.
        checkpoint: a whole checkpoint of it.
        step: optimiser steps done.
    """

    recipe: StudentRecipe
    run: Path
    checkpoint: Path
    step: int


def find_trained(target: Path, overrides: list[str]) -> Trained:
    """Finds a checkpoint, the newest whole one where a run has several.

    Args:
        target: a recipe's file, a run's folder or a checkpoint's folder.
        overrides: `section.key=value` changes to the recipe.

    Raises:
        RecipeError: none of the three, or the run has no whole checkpoint yet.
    """
    recipe = load_student_recipe(recipe_file(target), overrides)
    run, checkpoint = find_run(target, recipe.run.dir)
    return Trained(recipe, run, checkpoint, read_manifest(checkpoint)["step"])


def recipe_file(target: Path) -> Path:
    """The recipe of a target of `distill.evaluate`: a file, a run's folder or a checkpoint's.

    Raises:
        RecipeError: a folder of neither.
    """
    if target.is_dir() and not (target / "recipe.yaml").is_file():
        raise RecipeError(
            f"{target}: no recipe.yaml in it; give a recipe, the folder of a run, or one of its "
            "checkpoints such as RUN/checkpoints/step-00000100"
        )
    return target / "recipe.yaml" if target.is_dir() else target


def find_run(target: Path, run: Path) -> tuple[Path, Path]:
    """The folder of a run, and the checkpoint that the target means.

    Args:
        target: a recipe's file, a run's folder or a checkpoint's folder.
        run: the folder that the recipe names, which counts where the target is a file.

    Raises:
        RecipeError: the run has no whole checkpoint yet.
    """
    if not target.is_dir():
        return run, find_checkpoint(run)
    checkpoint = find_checkpoint(target)
    return (target.absolute().parent.parent if checkpoint == target else target), checkpoint


def load_trained(trained: Trained) -> tuple[dict[str, Student], Targets]:
    """Loads a student before and after training, and what it was trained towards.

    Returns:
        `untrained` (the weights that training started from) and `trained`, both in eval mode on
        this process's device; and the targets, with the run's own statistics.

    Raises:
        RecipeError: the checkpoint lacks statistics, or belongs to other teachers or another
            student than the recipe names.
    """
    teachers = build_teachers(trained.recipe)
    targets = build_targets(trained.recipe, teachers)
    untrained = build_student(trained.recipe, teachers).eval()
    student = load_student(trained.checkpoint / "student.safetensors")
    if student.targets != untrained.targets or student.spec != untrained.spec:
        raise RecipeError(
            f"{trained.checkpoint}: trained with other teachers or another student than the recipe "
            f"names; the recipe it was trained with is {trained.checkpoint / 'recipe.yaml'}"
        )
    device = distributed.device()
    if trained.recipe.objective.standardisation == "phi_s":
        for name in targets.teachers:
            path = trained.checkpoint / "statistics" / f"{name}.safetensors"
            statistics = load_statistics(path, IN_CHECKPOINT)
            if statistics is None:
                raise RecipeError(f"{path}: missing, or not the statistics of a checkpoint")
            phi_s = statistics.phi_s.to(device)
            targets.statistics[name] = statistics._replace(phi_s=phi_s)
    return {"untrained": untrained.to(device), "trained": student.to(device)}, targets
