"""The models that a benchmark can measure: teachers, students, their heads, and mean colours.

All are `Teacher`s: frozen encoders of images in [0, 1] that state which sizes they accept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from distill.evaluation.relative_change import require_known
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.trained import recipe_file
from student.hub import on_hub
from student.shipped import names, shipped
from teachers.build import parse_teacher
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.teacher import Teacher, TeacherConfig


class PixelsConfig(TeacherConfig):
    """Config of `Pixels`.

    Attributes:
        patch_size: side of a cell in pixels.
        resolution: (height, width) in pixels that benchmarks take as the native resolution.
    """

    kind: str = "pixels"
    patch_size: PositiveInt = 16
    resolution: tuple[PositiveInt, PositiveInt] = (224, 224)


class Pixels(Teacher):
    """Mean colours of patches, a baseline that every encoder should beat.

    The summary is an 8 x 8 thumbnail of the image.
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
        """Averages colours, see `Teacher.extract`."""
        thumbnail = F.adaptive_avg_pool2d(images, 8)
        return Features(thumbnail.flatten(1), F.avg_pool2d(images, self.spec.patch_size))


def parse_model(value: Any) -> TeacherConfig:
    """Parses the entry of a model in a recipe.

    Args:
        value: the entry of a teacher of a built-in kind or of a user's class, with or without an
            upsampler; `{kind: student, path: RUN}`, also with the name of a student that ships;
            `{kind: onnx, path: FILE}`; `{kind: pixels}`; or `{recipe: FILE, teacher: NAME}`, a
            teacher as a student's recipe configures it.

    Raises:
        TeacherError: unknown kind or key, or a wrong value.
        RecipeError: the recipe cannot be read or has no such teacher.
    """
    if isinstance(value, Mapping) and "recipe" in value:
        return _teacher_of(value)
    return parse_teacher(value)


def _teacher_of(value: Mapping[str, Any]) -> TeacherConfig:
    extra = sorted(set(value) - {"recipe", "teacher"})
    if extra or "teacher" not in value:
        wrong = f"unknown {', '.join(extra)}" if extra else "`teacher` is missing"
        raise RecipeError(
            f"expected {{recipe: FILE, teacher: NAME}} for the teacher of a recipe; {wrong}"
        )
    teachers = load_student_recipe(recipe_file(Path(value["recipe"])), []).teachers
    name = str(value["teacher"])
    require_known(f"teacher: {value['recipe']}", name, teachers, "teacher")
    return teachers[name]


def model_of(target: str) -> dict[str, Any]:
    """The recipe entry of a command's TARGET.

    Raises:
        RecipeError: neither the folder of a run, of a checkpoint or of an export, nor a student's
            file, graph or address on the hub, nor the name of a student that ships, of a timm
            model or of a shipped one.
    """
    path = Path(target)
    if path.is_dir() or path.suffix == ".safetensors" or on_hub(target) or shipped(target):
        return {"kind": "student", "path": target}
    if path.suffix == ".onnx":
        return {"kind": "onnx", "path": target}
    from teachers.timm_source import shipped_models, timm

    if not timm.is_model(target) and target not in shipped_models():
        known = [*names(), *timm.list_models(), *shipped_models()]
        raise RecipeError(
            f"{target}: neither a run, a checkpoint, a student's file or graph or the name of one "
            f"that ships, nor a timm model{did_you_mean(target.split('.')[0], known)}"
        )
    return {"kind": "timm", "model": target}
