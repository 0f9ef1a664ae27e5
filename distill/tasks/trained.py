"""Finds and loads a trained student, by its recipe, run or checkpoint, and its targets."""

from pathlib import Path
from typing import NamedTuple

from distill.runtime import distributed
from distill.runtime.checkpoint import find_checkpoint, read_manifest
from distill.runtime.errors import RecipeError
from distill.targets.source import LiveTargets
from distill.tasks.build import (
    build_student,
    build_targets,
    build_teachers,
    standardise_heads,
)
from distill.tasks.student_recipe import StudentRecipe, load_student_recipe
from student.model import Student
from student.storage import load_student
from teachers.files import shape_mismatch


class Trained(NamedTuple):
    """The folder of a student's run, that of a complete checkpoint, and its recipe and step."""

    recipe: StudentRecipe
    run: Path
    checkpoint: Path
    step: int


def find_trained(target: Path, overrides: list[str]) -> Trained:
    """Finds a checkpoint: of a run, the newest complete one.

    Args:
        target: a recipe's file, a run's folder or a checkpoint's folder.
        overrides: `section.key=value` changes to the recipe.

    Raises:
        RecipeError: the target is none of the three, or the run has no complete checkpoint yet.
    """
    recipe = load_student_recipe(recipe_file(target), overrides)
    run, checkpoint = find_run(target, recipe.run.dir)
    return Trained(recipe, run, checkpoint, read_manifest(checkpoint)["step"])


def recipe_file(target: Path) -> Path:
    """The recipe's file of a target: the file itself, or that in a run's or checkpoint's folder.

    Raises:
        RecipeError: the target is another folder.
    """
    if target.is_dir() and not (target / "recipe.yaml").is_file():
        raise RecipeError(
            f"{target}: no recipe.yaml in it; give a recipe, the folder of a run, or one of its "
            "checkpoints such as RUN/checkpoints/step-00000100"
        )
    return target / "recipe.yaml" if target.is_dir() else target


def find_run(target: Path, run: Path) -> tuple[Path, Path]:
    """The folder of a run, and the checkpoint that the target names: the newest, or itself.

    Args:
        target: a recipe's file, a run's folder or a checkpoint's folder.
        run: the folder that the recipe names, for a target that is a file.

    Raises:
        RecipeError: the run has no complete checkpoint yet.
    """
    if not target.is_dir():
        return run, find_checkpoint(run)
    checkpoint = find_checkpoint(target)
    return (target.absolute().parent.parent if checkpoint == target else target), checkpoint


def load_trained(trained: Trained) -> tuple[dict[str, Student], LiveTargets]:
    """Loads a student before and after training, and the targets that it was trained with.

    Returns:
        `untrained` (the initial weights) and `trained`, both in eval mode on this process's device;
        and the targets, with the run's own statistics.

    Raises:
        RecipeError: the checkpoint lacks statistics, or was trained with other teachers or another
            student than those of the recipe.
    """
    teachers = build_teachers(trained.recipe)
    targets = build_targets(trained.recipe, teachers)
    untrained = build_student(trained.recipe, teachers).eval()
    student = load_student(trained.checkpoint / "student.safetensors")
    wrong = shape_mismatch(untrained.state_dict(), student.state_dict())
    if student.targets != untrained.targets or student.spec != untrained.spec or wrong:
        raise RecipeError(
            f"{trained.checkpoint}: trained with other teachers or another student than those of "
            f"the recipe{f' ({wrong})' if wrong else ''}; use its own recipe, "
            f"{trained.checkpoint / 'recipe.yaml'}"
        )
    device = distributed.device()
    if trained.recipe.objective.standardisation == "phi_s":
        targets.statistics.load(trained.checkpoint / "statistics", targets.ensemble.teachers)
    standardise_heads(untrained, targets.statistics)
    return {"untrained": untrained.to(device), "trained": student.to(device)}, targets
