"""What the `config.json` beside a RADIO checkpoint from the hub states, apart from `args`.

RADIO's own script writes heads there as adaptors, `adaptors.NAME.head_mlp.*` for the summary and
`feat_mlp.*` for the map, whose dimensions are in `adaptor_configs`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachers.errors import TeacherError
from teachers.messages import say_once

# The heads for the teachers' features: public names, and the hub's.
SUMMARY_HEADS, SPATIAL_HEADS = "_heads.", "_feature_projections."
ADAPTORS = "adaptors."
_ADAPTOR = re.compile(r"adaptors\.([^.]+)\.(head|feat)_mlp\.(.+)")


def hub_head_name(name: str) -> str:
    """The public name of a tensor of an adaptor; any other name as it is."""
    found = _ADAPTOR.fullmatch(name)
    if found is None:
        return name
    kind = SUMMARY_HEADS if found[2] == "head" else SPATIAL_HEADS
    return f"{kind}{found[1]}.{found[3].replace('.grandma', '.gamma')}"


def hub_teachers(
    config: Mapping[str, Any], args: Mapping[str, Any]
) -> tuple[Mapping[str, Any], ...]:
    """The teachers' entries in `args`, with the upsampling that an adaptor's config states.

    Args:
        config: the content of `config.json`; empty without one.
        args: the public ones.

    Raises:
        TeacherError: an adaptor has no dimensions, or its upsampling is not 1 or more.
    """
    teachers = list[Mapping[str, Any]]()
    for teacher in args.get("teachers") or ():
        name = teacher.get("name") if isinstance(teacher, Mapping) else None
        factor = _upsampling(config, name)
        teachers.append({**teacher, "fd_upsample_factor": factor} if factor else teacher)
    return tuple(teachers)


def _upsampling(config: Mapping[str, Any], name: Any) -> int | None:
    configs = config.get("adaptor_configs") or {}
    own = configs.get(name) or {} if isinstance(configs, Mapping) else None
    feature = own.get("feature", own) if isinstance(own, Mapping) else None
    if not isinstance(feature, Mapping):
        raise TeacherError(
            f"config.json: adaptor_configs: expected the dimensions of {name} by their names, got "
            f"{configs!r}"
        )
    factor = feature.get("upsample_factor")
    if factor is not None and (type(factor) is not int or factor < 1):
        raise TeacherError(
            f"config.json: adaptor_configs: upsample_factor of {name}: expected 1 or more, got "
            f"{factor!r}"
        )
    return factor


def hub_resolution(config: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """The (height, width) in pixels that a config states, or None; says what is not followed.

    Args:
        config: the content of `config.json`.
        path: the weights file beside it, for messages.

    Raises:
        TeacherError: `preferred_resolution` is no size.
    """
    if config.get("vitdet_window_size"):
        say_once(
            f"weights {path}: vitdet_window_size {config['vitdet_window_size']} of its config.json "
            "is not followed: attention is global here"
        )
    size = config.get("preferred_resolution")
    if size is None:
        return None
    if not isinstance(size, list | tuple) or [type(side) for side in size] != [int, int]:
        raise TeacherError(
            f"{path.parent / 'config.json'}: preferred_resolution: expected [height, width], got "
            f"{size!r}"
        )
    return size[0], size[1]


def repository(model: str) -> str:
    """The hub's repository of a published model: C-RADIOv3-L, and RADIO-L for radio_v2.5-l."""
    family, _, version = model.partition("_v")
    number, _, size = version.partition("-")
    size = size if size == "g" else size.upper()
    return f"nvidia/{family.upper()}{'' if family == 'radio' else f'v{number}'}-{size}"
