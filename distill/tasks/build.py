"""Builds the teachers, the student and the targets of a recipe, and finds inherited statistics."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from distill.parametrization.finetuning import freeze
from distill.runtime import distributed
from distill.runtime.config import load_yaml
from distill.runtime.errors import USER_ERRORS, RecipeError
from distill.runtime.tracking import log
from distill.targets.ensemble import Ensemble
from distill.targets.routes import choose_route
from distill.targets.source import LiveTargets, TargetSource
from distill.targets.target_statistics import (
    IN_CHECKPOINT,
    Statistics,
    TargetStatistics,
    load_statistics,
)
from distill.tasks.route_table import route_rows
from distill.tasks.student_recipe import StudentRecipe
from student.config import StudentInit
from student.heads import Head
from student.model import Student
from student.storage import read_header, student_file
from teachers.build import TEACHERS, build_teacher
from teachers.catalog import licence_of
from teachers.compiled import compile_teacher
from teachers.dry_run import dry_run
from teachers.errors import TeacherError
from teachers.phi_s import any_phi_s
from teachers.teacher import Teacher


def build_teachers(
    recipe: StudentRecipe,
    names: Collection[str] | None = None,
    *,
    in_host: Collection[str] = (),
) -> dict[str, Teacher]:
    """Builds every teacher of a recipe, on this process's device, and checks the user's own.

    Args:
        recipe: the student's.
        names: of the teachers that this rank runs; None for all. The others, and those whose
            losses all have weight zero, are on the meta device, without weights, for their specs.
        in_host: names of those that stay in host memory, not compiled, until `Ensemble.place`.

    Raises:
        RecipeError: a teacher cannot be built or breaks the contract; names its entry.
    """
    teachers = {}
    dtype = teacher_dtype(recipe)
    for name, config in recipe.teachers.items():
        runs = (names is None or name in names) and recipe.objective.weights_of(name).count
        here = torch.device("cpu") if name in in_host else distributed.device()
        device = here if runs else torch.device("meta")
        try:
            teachers[name] = build_teacher(config, device=device, dtype=dtype)
            if runs and not TEACHERS.is_built_in(config.kind):
                dry_run(teachers[name])
            log.info("teacher %s: %s", name, licence_of(config))
        except USER_ERRORS as error:
            raise RecipeError(f"teachers.{name}: {error}") from error
        if runs and recipe.targets.compile and name not in in_host:
            compile_teacher(teachers[name])
    return teachers


def teacher_dtype(recipe: StudentRecipe) -> torch.dtype | None:
    """Of the matrices of a recipe's teachers; None for that of their weights."""
    return torch.bfloat16 if recipe.targets.precision == "bf16" else None


def build_student(recipe: StudentRecipe, teachers: Mapping[str, Teacher]) -> Student:
    """Builds the student; its initial weights depend on the recipe's seed only."""
    from student.initial import build  # imports timm, which takes two seconds

    distributed.seed_default_generators(recipe.run.seed, "student")
    return build(recipe.student, {name: teacher.spec for name, teacher in teachers.items()})


def freeze_student(
    student: Student, recipe: StudentRecipe, teachers: Mapping[str, Teacher]
) -> None:
    """Freezes in place what a recipe does not train."""
    if recipe.finetuning is not None:
        assert isinstance(recipe.student.init, StudentInit)
        running = recipe.running(teachers)
        freeze(student, recipe.student.init, recipe.finetuning, running)


@torch.no_grad()
def standardise_heads(student: Student, statistics: Statistics) -> None:
    """Makes heads that started in their teachers' own spaces return standardised maps, in place.

    Before the student is reparametrised, whose weights cannot be set.
    """
    for name in sorted(student.in_teacher_space):
        head = student.heads[name]
        assert isinstance(head, Head)
        last = head.spatial.final[2]
        assert isinstance(last, nn.Linear)
        last.load_state_dict(statistics.standardise_linear(name, last).state_dict())
    student.in_teacher_space.clear()


def build_targets(
    recipe: StudentRecipe,
    teachers: Mapping[str, Teacher],
    names: Collection[str] | None = None,
) -> LiveTargets:
    """The targets of a recipe, still without statistics.

    Teachers whose losses all have weight zero are never run.

    Args:
        recipe: the student's.
        teachers: all of its teachers.
        names: of the teachers that this rank runs; None for all.

    Raises:
        RecipeError: all weights are zero, or a teacher has no route to a size of the student.
    """
    running = recipe.running(teachers)
    if not running:
        raise RecipeError(
            "objective.weights: every weight is zero, so there is nothing to learn; give one "
            "teacher a spatial or summary weight above 0"
        )
    route_rows(recipe, teachers)
    cells = recipe.cell_sizes(running)
    for name, teacher in running.items():
        for size in recipe.evaluation.resolutions if recipe.evaluation else ():
            try:
                choose_route(teacher, size, cells[name])
            except TeacherError as error:
                raise RecipeError(f"teachers.{name}: {error}") from error
    here = {name: t for name, t in running.items() if names is None or name in names}
    statistics = Statistics(phi_s=recipe.objective.standardisation == "phi_s")
    return LiveTargets(Ensemble(here, cells), statistics)


def fingerprints_of(targets: TargetSource) -> dict[str, str]:
    """Teacher name to fingerprint, of the teachers of all ranks; every rank must call this."""
    found: dict[str, str] = {}
    for own in distributed.gather_objects(targets.fingerprints()):
        found |= own
    return found


_NOT_ENCODER = ("upsampler", "resolution", "chunk_size")  # options that leave the encoder as it is


def inherited_statistics(
    recipe: StudentRecipe, fingerprints: Mapping[str, str] | None = None
) -> dict[str, TargetStatistics]:
    """Teacher name to the statistics under which `student.init` trained the head that is reused.

    Heads of a file that are in their teachers' own spaces take any statistics; those of teachers
    that do not run keep their space. Otherwise a teacher is left out, with a warning, if it is
    another encoder there, or if the student's file is not in a checkpoint's folder, with the
    statistics beside it. The same encoder has the same entry in both recipes, up to its upsampler,
    or the same fingerprint, wherever its weights are.

    Args:
        recipe: the student's.
        fingerprints: of all ranks' teachers; None tells encoders by their entries alone.
    """
    init = recipe.student.init
    if not isinstance(init, StudentInit) or not init.heads:
        return {}
    if recipe.objective.standardisation == "none":
        return {}
    folder = student_file(init.path).parent
    stored = load_yaml(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    header = read_header(init.path)
    if header.metadata.get("head_space") == "teacher":  # see `standardise_heads`
        return {
            name: _identity(spec.spatial_dim)
            for name, spec in header.targets.items()
            if name in recipe.teachers and not recipe.objective.losses_of(name, spec)
        }
    theirs = json.loads(header.metadata.get("fingerprints", "{}"))
    found = {}
    for name in [name for name in header.targets if name in recipe.teachers]:
        path = folder / "statistics" / f"{name}.safetensors"
        statistics = load_statistics(path, IN_CHECKPOINT)
        ours = recipe.teachers[name].model_dump(mode="json")
        alike = _encoder(stored.get("teachers", {}).get(name, {})) == _encoder(ours)
        alike |= name in theirs and theirs[name] == (fingerprints or {}).get(name)
        if statistics is None:
            log.warning(
                "student.init: the head of %s is reused, but its statistics, %s, are missing: its "
                "map starts on other axes. Give the student.safetensors of a checkpoint",
                *(name, path),
            )
        elif not alike:
            log.warning("student.init: %s is another encoder there; its head is not reused", name)
        else:
            found[name] = statistics
    return found


def _identity(dim: int) -> TargetStatistics:
    """Statistics under which a teacher's own space is the standardised one."""
    return TargetStatistics(any_phi_s(dim), torch.ones(()))


def _encoder(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _NOT_ENCODER}
