"""Safetensors files whose header names their format, and checks of state dicts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import lfs_hint


@contextmanager
def open_format(
    path: str | PathLike[str], what: str, format: str, error: type[ValueError]
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Opens a safetensors file whose header has an entry `format`.

    Args:
        path: the file.
        what: its contents, for messages: `student`.
        format: the value that `format` must have.
        error: the class of the exception.

    Yields:
        The open file and its header.

    Raises:
        ValueError: of class `error`; the file has another format, or a header entry that the block
            reads is missing (KeyError) or invalid (ValidationError).
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != format:
                raise error(
                    f"{what} {path}: its format is {header.get('format')!r}, expected {format!r}"
                )
            yield file, header
    except (SafetensorError, ValidationError, KeyError) as reason:
        raise error(
            f"{what} {path}: not a valid {what} file: {reason}{lfs_hint(Path(path))}"
        ) from reason


def shape_mismatch(own: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> str | None:
    """Describes how names or shapes of `came` differ from the expected `own`; None if equal."""
    expected, found = ({k: tuple(v.shape) for k, v in state.items()} for state in (own, came))
    wrong = sorted(k for k in expected | found if expected.get(k) != found.get(k))
    if not wrong:
        return None
    return (
        f"{len(wrong)} weights do not fit; {wrong[0]} has shape {found.get(wrong[0])}, "
        f"expected {expected.get(wrong[0])} (None: absent)"
    )
