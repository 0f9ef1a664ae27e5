"""From a recipe's teacher entry to a teacher: the single table of kinds."""

from typing import Any

import torch

from teachers.errors import TeacherError
from teachers.fingerprint import teacher_fingerprint
from teachers.kinds import Registry
from teachers.matched import MatchedTeacher
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler
from teachers.upsamplers.trained import TrainedUpsampler
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

TEACHERS = Registry(
    noun="teacher",
    table={
        "dfn_clip": "teachers.open_clip_teacher:DFNCLIP",
        "hf": "teachers.hf_teacher:HFTeacher",
        "open_clip": "teachers.open_clip_tower:OpenClipTower",
        "radio": "teachers.radio_teacher:RadioTeacher",
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
        teacher = _upsampled(teacher, config.upsampler)
    if dtype is not None:
        teacher = teacher.cast(dtype)
    return teacher.to(device).train() if device is not None else teacher.train()


def _upsampled(teacher: Teacher, config: UpsamplerConfig | tuple[UpsamplerConfig, ...]) -> Teacher:
    if isinstance(config, tuple):
        return MatchedTeacher(teacher, [_upsampler(teacher, each) for each in config])
    return UpsampledTeacher(teacher, _upsampler(teacher, config))


def _upsampler(teacher: Teacher, config: UpsamplerConfig) -> Upsampler:
    upsampler = build_upsampler(config, teacher.spec)
    if teacher.mean.is_meta:
        return upsampler
    if isinstance(upsampler, TrainedUpsampler):
        upsampler.check_encoder(teacher_fingerprint(teacher.train()))
    elif next(upsampler.parameters(), None) is not None:
        raise TeacherError(
            f"upsampler: {config.kind} has weights to learn; train it with `deepspeed --module "
            "distill.train_upsampler RECIPE`, and give the path of the file that this writes"
        )
    return upsampler
