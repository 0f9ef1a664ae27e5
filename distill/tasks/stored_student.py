"""A trained student on disk, as a teacher: `kind: student` in recipes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import PositiveInt
from safetensors import safe_open

from distill.formats.source import trained_sizes
from distill.runtime.checkpoint import find_checkpoint
from distill.runtime.config import load_yaml, parse_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.tracking import log
from distill.tasks.build import build_student, build_teachers
from distill.tasks.student_encoder import StudentEncoder
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.trained import recipe_file
from student.hf_folder import HEADS
from student.hub import on_hub
from student.model import Student
from student.shipped import is_name, shipped
from student.storage import load_student, read_header, student_file
from teachers.teacher import TeacherConfig


class StoredStudentConfig(TeacherConfig):
    """A trained student, to be evaluated or to teach another one.

    Attributes:
        path: a run's folder (its newest complete checkpoint), a checkpoint's, an exported file, or
            a folder of `--format hf`; `hf://OWNER/NAME` on the hub; or the name of one that ships.
        head: the teacher whose head is used; None for the backbone.
        untrained: whether to use the weights before training; needs a run's folder.
        resolution: (height, width) in pixels that a benchmark takes as the native one; None for
            the largest that the student trained at, by its file or its recipe. Where neither tells,
            as in a RADIO model's conversion, the largest that the position table covers.
    """

    kind: str = "student"
    path: Path
    head: str | None = None
    untrained: bool = False
    resolution: tuple[PositiveInt, PositiveInt] | None = None

    @property
    def exported(self) -> bool:
        """Whether the path is that of an export, and not of a run or a checkpoint."""
        here = self.path.is_file() or (self.path / HEADS).is_file()
        return here or on_hub(self.path) or shipped(self.path) is not None

    def licence(self) -> str:
        """The licence of this code, and those of the teachers that the student learned from."""
        if self.untrained:
            return "random weights, no licence"
        with safe_open(_file(self), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("metadata", "{}"))
        return licence_text(json.loads(kept.get("licences", "{}")))


class StoredStudent(StudentEncoder):
    """A trained student on disk."""

    Config: ClassVar[type[TeacherConfig]] = StoredStudentConfig
    fingerprinted_as = "distill.evaluation.models.StoredStudent"

    config: StoredStudentConfig

    @classmethod
    def from_config(cls, config: StoredStudentConfig) -> Self:
        """Loads the student.

        Raises:
            RecipeError: there is no checkpoint, or no such head, or untrained weights are asked of
                an export.
        """
        if config.untrained and config.exported:
            raise RecipeError(f"untrained: needs the folder of a run, got an export, {config.path}")
        resolution = config.resolution or _trained_resolution(config)
        found = cls(_load(config), head=config.head, resolution=resolution)
        found.config = config
        return found


def licence_text(teachers: Mapping[str, str | None]) -> str:
    """The licence of a student's file: of this code, and of the teachers' weights by name."""
    told = {name: licence for name, licence in teachers.items() if licence is not None}
    known = "; ".join(f"{name}, {licence}" for name, licence in told.items())
    return f"Apache-2.0; of its teachers: {known or 'not in its file'}"


def _trained_resolution(config: StoredStudentConfig) -> tuple[int, int] | None:
    """The largest size that the student trained at, which is logged; None if nothing tells it."""
    metadata: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    if config.untrained:
        recipe = load_yaml(recipe_file(config.path))
    else:
        path = _file(config)
        metadata = read_header(path).metadata
        if "recipe" in metadata:
            recipe = parse_yaml(metadata["recipe"], str(path))
        elif (path.parent / "recipe.yaml").is_file():
            recipe = load_yaml(path.parent / "recipe.yaml")
    sizes = trained_sizes(metadata, recipe)
    of = f"student {config.path}: its native size is"
    if not sizes:
        log.info("%s the largest of its position table, as its file tells no size", of)
        return None
    log.info("%s %d x %d px, the largest that it trained at", of, *sizes[-1])
    return sizes[-1]


def _load(config: StoredStudentConfig) -> Student:
    if config.untrained:
        recipe = load_student_recipe(recipe_file(config.path), [])
        return build_student(recipe, build_teachers(recipe))
    return load_student(_file(config))


def _file(config: StoredStudentConfig) -> Path:
    if config.exported or is_name(config.path):
        return student_file(config.path)
    return find_checkpoint(config.path) / "student.safetensors"
