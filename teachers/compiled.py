"""Compiles the parts of a teacher that gain from it: the encoder and FeatSharp's fusion."""

import torch

from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.fusion import FusionBlock


def compile_teacher(teacher: Teacher) -> Teacher:
    """Compiles a teacher's encoder and the fusion of its upsamplers in place, and returns it.

    Compilation runs at the first images of each size. Features differ from eager ones by rounding.
    """
    for module in teacher.modules():
        if isinstance(module, FusionBlock):
            module.compile()
        elif isinstance(module, Teacher) and not isinstance(
            module, (UpsampledTeacher, MultiScaleTeacher)
        ):
            module.extract = torch.compile(module.extract)  # type: ignore[method-assign]
    return teacher
