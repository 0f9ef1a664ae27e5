"""Builds teachers from recipe entries; the table of teacher kinds."""

import warnings
from typing import Any

import torch

from teachers.errors import TeacherError
from teachers.fingerprint import teacher_fingerprint
from teachers.kinds import Registry
from teachers.multi_scale import MultiScaleTeacher
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.build import build_upsampler
from teachers.upsamplers.trained import TrainedUpsampler
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig
from teachers.weights import check_finite

_NO_OP = ".*copying from a non-meta parameter.*is a no-op"

TEACHERS = Registry(
    noun="teacher",
    table={
        "dfn_clip": "teachers.open_clip_teacher:DFNCLIP",
        "hf": "teachers.hf_teacher:HFTeacher",
        "open_clip": "teachers.open_clip_teacher:OpenClipTeacher",
        "radio": "teachers.radio_teacher:RadioTeacher",
        "siglip": "teachers.open_clip_teacher:SigLIP",
        "timm": "teachers.timm_teacher:TimmTeacher",
    },
    base=Teacher,
    config=TeacherConfig,
)


def parse_teacher(value: Any) -> TeacherConfig:
    """Validates a teacher's entry with the `Config` of the class that its `kind` names.

    Args:
        value: a mapping with a `kind`, or a config, which is returned as it is.

    Raises:
        TeacherError: unknown kind or key, wrong value, or an incomplete class.
    """
    return TEACHERS.parse(value)


def build_teacher(
    config: TeacherConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Teacher:
    """Builds a frozen teacher, with the upsampler of its config.

    Args:
        config: from `parse_teacher`.
        device: where to put it; `meta` builds shapes only and reads no weights.
        dtype: precision of the encoder's matrices, see `Teacher.cast`; None for float32.

    Raises:
        TeacherError: the model or its weights are missing, do not fit, or are not finite.
    """
    meta = device is not None and torch.device(device).type == "meta"
    teacher = _construct(config, meta=meta)
    if config.chunk_size is not None:  # a user's own class may ignore it
        teacher.chunk_size = config.chunk_size
    if config.upsampler is not None:
        teacher = _upsampled(teacher, config.upsampler)
    if dtype is not None:
        teacher = teacher.cast(dtype)
    teacher = (teacher if device is None else teacher.to(device)).freeze()
    check_finite(teacher)
    return teacher


def _construct(config: TeacherConfig, *, meta: bool) -> Teacher:
    """The teacher without its upsampler; on the meta device it has shapes only."""
    kind = TEACHERS.resolve(config.kind)
    built_in = TEACHERS.is_built_in(config.kind)
    if meta:
        try:
            # A user's class may load its weights itself, which does nothing on the meta device.
            with torch.device("meta"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", _NO_OP)
                built: Teacher = kind.from_config(config)
                return built
        except Exception:
            if built_in:
                raise
        # It may also need the values of its weights: then it is built as in training.
    try:
        teacher: Teacher = kind.from_config(config)
    except TeacherError:
        raise
    except Exception as error:  # a user's own code may raise anything
        if built_in:
            raise
        raise TeacherError(
            f"{config.kind} cannot be built: {type(error).__name__}: {error}"
        ) from error
    return teacher.to("meta") if meta else teacher


def _upsampled(teacher: Teacher, config: UpsamplerConfig | tuple[UpsamplerConfig, ...]) -> Teacher:
    if isinstance(config, tuple):
        return MultiScaleTeacher(teacher, [_upsampler(teacher, each) for each in config])
    return UpsampledTeacher(teacher, _upsampler(teacher, config))


def _upsampler(teacher: Teacher, config: UpsamplerConfig) -> Upsampler:
    upsampler = build_upsampler(config, teacher.spec)
    if teacher.mean.is_meta:
        return upsampler
    if isinstance(upsampler, TrainedUpsampler):
        upsampler.check_encoder(teacher_fingerprint(teacher.freeze()))
    elif next(upsampler.parameters(), None) is not None:
        raise TeacherError(
            f"upsampler: {config.kind} has weights to learn; train it with `deepspeed --module "
            "distill.train_upsampler RECIPE` and give the path of the file that it writes"
        )
    return upsampler
