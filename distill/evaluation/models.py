"""What a benchmark can measure: teachers, students, a student's head, and the colours of pixels.

All are `Teacher`s: frozen encoders that take images in [0, 1] and own what they accept.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from pydantic import PositiveInt
from safetensors import safe_open
from torch import Tensor

from distill.runtime.checkpoint import find_checkpoint
from distill.runtime.errors import RecipeError
from distill.tasks.build import build_student, build_teachers
from distill.tasks.student_encoder import StudentEncoder
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.trained import recipe_file
from student.model import Student
from student.storage import load_student
from teachers.build import TEACHERS, parse_teacher
from teachers.features import Features, FeatureSpec
from teachers.kinds import did_you_mean
from teachers.teacher import Teacher, TeacherConfig

_KINDS = {"pixels": "distill.evaluation.models:Pixels"}


class StoredStudentConfig(TeacherConfig):
    """A student of ours, to be measured or to teach another one.

    Attributes:
        path: a run's folder (its newest whole checkpoint), a checkpoint's, or an exported file.
        head: the teacher whose head is measured; None for the backbone.
        untrained: whether to take the weights that training started from; needs a run.
        resolution: (height, width) in pixels that a benchmark takes for its native one; None for
            the largest that the position table covers.
    """

    kind: str = "student"
    path: Path
    head: str | None = None
    untrained: bool = False
    resolution: tuple[PositiveInt, PositiveInt] | None = None

    def licence(self) -> str:
        """That of this code, and those of the teachers that it learned from."""
        if self.untrained:
            return "random weights, no licence"
        with safe_open(_file(self), framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get("metadata", "{}"))
        teachers = json.loads(kept.get("licences", "{}"))
        known = "; ".join(f"{name}, {licence}" for name, licence in teachers.items())
        return f"Apache-2.0; of its teachers: {known or 'not kept in its file'}"


class StoredStudent(StudentEncoder):
    """A student that lies on disk."""

    Config: ClassVar[type[TeacherConfig]] = StoredStudentConfig

    config: StoredStudentConfig

    @classmethod
    def from_config(cls, config: StoredStudentConfig) -> Self:
        """Loads it.

        Raises:
            RecipeError: there is no checkpoint, or no such head.
        """
        found = cls(_load(config), head=config.head, resolution=config.resolution)
        found.config = config
        return found


def _load(config: StoredStudentConfig) -> Student:
    if config.untrained:
        if config.path.is_file():
            raise RecipeError(f"untrained: needs the folder of a run, not a file, {config.path}")
        recipe = load_student_recipe(recipe_file(config.path), [])
        return build_student(recipe, build_teachers(recipe))
    return load_student(_file(config))


def _file(config: StoredStudentConfig) -> Path:
    if config.path.is_file():
        return config.path
    return find_checkpoint(config.path) / "student.safetensors"


class PixelsConfig(TeacherConfig):
    """Mean colours.

    Attributes:
        patch_size: pixels of a cell.
        resolution: (height, width) in pixels that a benchmark takes for its native one.
    """

    kind: str = _KINDS["pixels"]
    patch_size: PositiveInt = 16
    resolution: tuple[PositiveInt, PositiveInt] = (224, 224)


class Pixels(Teacher):
    """The floor under every encoder: the mean colour of each patch, and all of them as summary.

    Args:
        config: the cells. The summary is an 8 x 8 thumbnail.
    """

    Config: ClassVar[type[TeacherConfig]] = PixelsConfig

    def __init__(self, config: PixelsConfig) -> None:
        spec = FeatureSpec(
            summary_dim=3 * 8 * 8,
            spatial_dim=3,
            patch_size=config.patch_size,
            resolution=config.resolution,
            any_resolution=True,
        )
        super().__init__(spec, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

    def extract(self, images: Tensor) -> Features:
        """Averages; see `Teacher.extract`."""
        thumbnail = F.adaptive_avg_pool2d(images, 8)
        return Features(thumbnail.flatten(1), F.avg_pool2d(images, self.spec.patch_size))


def parse_model(value: Any) -> TeacherConfig:
    """The config of what is measured.

    Args:
        value: a teacher's recipe entry (`kind: dfn_clip`, ..., or a user's own, upsampled or not);
            `{kind: student, path: RUN}`; `{kind: pixels}`; or `{recipe: FILE, teacher: NAME}`, a
            teacher as a student's recipe has it.

    Raises:
        TeacherError: unknown kind or key, or a wrong value.
        RecipeError: the recipe cannot be read or has no such teacher.
    """
    if isinstance(value, Mapping) and "recipe" in value:
        return _teacher_of(value)
    if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
        kind = value["kind"]
        if ":" not in kind and kind not in TEACHERS.table and kind not in _KINDS:
            known = [*TEACHERS.table, *_KINDS]
            raise RecipeError(
                f"kind: {kind!r} is unknown{did_you_mean(kind, known)}; choose one of "
                f"{sorted(known)}, or the import path of your own teacher, package.module:Class"
            )
        value = {**value, "kind": _KINDS.get(kind, kind)}
    return parse_teacher(value)


def _teacher_of(value: Mapping[str, Any]) -> TeacherConfig:
    extra = sorted(set(value) - {"recipe", "teacher"})
    if extra or "teacher" not in value:
        wrong = f"unknown {', '.join(extra)}" if extra else "`teacher` is missing"
        raise RecipeError(
            f"a teacher of a recipe is written {{recipe: FILE, teacher: NAME}}; {wrong}"
        )
    teachers = load_student_recipe(recipe_file(Path(value["recipe"])), []).teachers
    name = str(value["teacher"])
    if name not in teachers:
        raise RecipeError(
            f"teacher: {value['recipe']} has no {name!r}{did_you_mean(name, teachers)}; "
            f"there are {', '.join(teachers)}"
        )
    return teachers[name]


def model_of(target: str) -> dict[str, Any]:
    """What a command's TARGET means as a recipe entry: a student that lies there, or a timm name.

    Args:
        target: a run's folder, a checkpoint's, a student's file, or a name that timm knows.

    Raises:
        RecipeError: neither.
    """
    path = Path(target)
    if path.is_dir() or path.suffix == ".safetensors":
        return {"kind": "student", "path": target}
    import timm

    if not timm.is_model(target):
        raise RecipeError(
            f"{target}: no run, checkpoint or student's file, and no timm model"
            f"{did_you_mean(target.split('.')[0], timm.list_models())}"
        )
    return {"kind": "timm", "model": target}
