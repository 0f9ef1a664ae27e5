"""Compiles the parts of a teacher that gain from it: the encoder and FeatSharp's fusion."""

import torch

from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.fusion import FusionBlock


def compile_teacher(teacher: Teacher) -> Teacher:
    """Compiles a teacher's encoder, and the fusion of its upsamplers, with `torch.compile`.

    Compilation runs at the first images, and again at the first images of another size. Features
    differ from the eager teacher's by rounding.

    Args:
        teacher: changed in place, and returned.
    """
    for module in teacher.modules():
        if isinstance(module, FusionBlock):
            module.compile()
        elif isinstance(module, Teacher) and not isinstance(
            module, (UpsampledTeacher, MultiScaleTeacher)
        ):
            module.extract = torch.compile(module.extract)  # type: ignore[method-assign]
    return teacher
