"""From a recipe's teacher entry to a teacher: the single table of kinds."""

from typing import Any

import torch

from teachers.kinds import Family
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler

TEACHERS = Family(
    noun="teacher",
    table={
        "dfn_clip": "teachers.open_clip_teacher:DFNCLIP",
        "siglip": "teachers.open_clip_teacher:SigLIP",
        "timm": "teachers.timm_teacher:TimmTeacher",
    },
    base=Teacher,
    config=TeacherConfig,
)


def parse_teacher(value: Any) -> TeacherConfig:
    """The config of the teacher that `kind` names, as its class declares it.

    Args:
        value: a mapping with a `kind`, or a config, which is returned as it is.

    Raises:
        TeacherError: unknown kind or key, wrong value, a class that is no complete teacher.
    """
    return TEACHERS.parse(value)


def build_teacher(
    config: TeacherConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Teacher:
    """Builds a frozen teacher, upsampled where its config asks for it.

    Args:
        config: from `parse_teacher`.
        device: where to put it; `meta` builds shapes only and reads no weights.
        dtype: precision of the encoder's matrices, see `Teacher.cast`; None for float32.

    Raises:
        TeacherError: the model or its weights are not there, or do not fit.
    """
    found = TEACHERS.resolve(config.kind)
    if device is not None and torch.device(device).type == "meta":
        with torch.device("meta"):
            teacher: Teacher = found.from_config(config)
    else:
        teacher = found.from_config(config)
    if config.chunk_size is not None:  # also where a user's own class forgets it
        teacher.chunk_size = config.chunk_size
    if config.upsampler is not None:
        teacher = UpsampledTeacher(teacher, build_upsampler(config.upsampler, teacher.spec))
    if dtype is not None:
        teacher = teacher.cast(dtype)
    return teacher.to(device).train() if device is not None else teacher.train()
