"""Safetensors files whose header names what they hold, the weights in a checkpoint, state dicts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import atomic, lfs_hint
from teachers.messages import took

SHIPPED = Path(__file__).parent / "small"  # the teachers in this package

# Where a checkpoint holds several sets of weights: timm's order, then that of other projects.
# DINO evaluates its teacher; `module` is DeepSpeed's.
TIMM_SETS = ("state_dict_ema", "model_ema", "state_dict", "model")
OPEN_CLIP_SETS = ("state_dict",)
_SETS = (*TIMM_SETS, "ema", "teacher", "module", "student")

_HOLDS = "holds"  # the header's entry for our own name of what a file holds


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], format: str | None = None
) -> None:
    """Writes a safetensors file, whole or not at all; the only place that does.

    The header says `format: pt`, without which accelerate and transformers refuse a file.

    Args:
        path: the file.
        tensors: on any device.
        header: further entries.
        format: what the file holds, for `open_format`; None for a file that is not read by it.
    """
    named = {"format": "pt"} if format is None else {"format": "pt", _HOLDS: format}
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as partial:
        save_file(own, partial, {**header, **named})


def halved(
    tensors: Mapping[str, Tensor],
    whole: Callable[[str, Tensor], bool],
    where: str,
    error: type[ValueError],
) -> dict[str, Tensor]:
    """Weights for a file of half the size: float16 but for what is small and sensitive.

    Args:
        tensors: by name; integers stay as they are.
        whole: by name and tensor, whether a tensor is stored in float32 all the same.
        where: their origin, for messages.
        error: the class of the exception.

    Raises:
        ValueError: of class `error`; a value is beyond float16's range.
    """
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            found[name] = tensor
            continue
        found[name] = tensor.to(torch.float32 if whole(name, tensor) else torch.float16)
        if not found[name].isfinite().all():
            raise error(
                f"{where}: {name} holds values up to {tensor.abs().max():.3g}, and float16 ends at "
                f"{torch.finfo(torch.float16).max:.0f}; store it in float32, without --half"
            )
    return found


def format_of(header: Mapping[str, str] | None) -> str | None:
    """What a file holds, by its header; files written before `format: pt` had it there."""
    known = header or {}
    return known.get(_HOLDS, known.get("format"))


@contextmanager
def open_format(
    path: str | PathLike[str], what: str, format: str, error: type[ValueError]
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Opens a safetensors file whose header says that it holds what is expected.

    Args:
        path: the file.
        what: its contents, for messages: `student`.
        format: what it must hold, see `format_of`.
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
            if (came := format_of(header)) != format:
                raise error(f"{what} {path}: its format is {came!r}, expected {format!r}")
            yield file, header
    except (SafetensorError, ValidationError, KeyError) as reason:
        raise error(
            f"{what} {path}: not a valid {what} file: {reason}{lfs_hint(Path(path))}"
        ) from reason


def choose_state(content: Any, where: str, order: Sequence[str] = ()) -> Mapping[str, Any]:
    """The state dict in the content of a checkpoint, and which one it is, where there are several.

    Args:
        content: what `torch.load` returned.
        where: the file, for messages.
        order: names of sets of weights, the preferred one first, by the rule of the library that
            the weights are for; other common names follow, in timm's order.
    """
    order = tuple(dict.fromkeys([*order, *_SETS]))
    while isinstance(content, Mapping):
        sets = [key for key, value in content.items() if _holds_weights(value)]
        named = [key for key in order if key in sets]
        if (
            not named
            and len(sets) == 1
            and not any(isinstance(v, Tensor) for v in content.values())
        ):
            named = sets  # one set under a name of its own
        if not named:
            break
        took(f"weights {where}", named[0], sets, "name another by saving it alone")
        content = content[named[0]]
    return content if isinstance(content, Mapping) else {}


def _holds_weights(value: Any) -> bool:
    """Whether a value is a state dict, or a mapping around one."""
    if not isinstance(value, Mapping):
        return False
    named = [value[key] for key in value if isinstance(key, str)]
    return any(isinstance(each, Tensor) for each in named) or any(
        _holds_weights(value[key]) for key in _SETS if key in value
    )


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
