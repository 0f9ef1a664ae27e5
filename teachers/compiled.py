"""What of a teacher is worth compiling: the encoder, and the fusion of an upsampler."""

import torch

from teachers.matched import MatchedTeacher
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.fusion import FusionBlock


def compile_teacher(teacher: Teacher) -> Teacher:
    """Has `torch.compile` make kernels of a teacher's encoder and of its upsamplers' fusion.

    That happens at the first images, and once more when another size comes. The features differ
    from the eager teacher's by rounding.

    Args:
        teacher: changed in place, and returned.
    """
    for module in teacher.modules():
        if isinstance(module, FusionBlock):
            module.compile()
        elif isinstance(module, Teacher) and not isinstance(
            module, (UpsampledTeacher, MatchedTeacher)
        ):
            module.extract = torch.compile(module.extract)  # type: ignore[method-assign]
    return teacher
