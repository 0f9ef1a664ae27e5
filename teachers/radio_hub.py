"""What the `config.json` beside a RADIO checkpoint from the hub states, apart from `args`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teachers.errors import TeacherError
from teachers.messages import say_once


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
