"""The pixel normalisation of a library's model: what its source states, an entry sets, or neither.

The source that comes with the weights decides: a config beside them, a published tag, a hub
repository. An entry's `mean` and `std` overrule it, and the conflict is said. What nobody states is
assumed, and said too.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from teachers.errors import TeacherError
from teachers.messages import say_once
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from teachers.teacher import TeacherConfig

Colour = tuple[float, float, float]
_NAMES = {
    "OpenAI's": (OPENAI_MEAN, OPENAI_STD),
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
}


class NormalisedConfig(TeacherConfig):
    """The entry of a model from a library, which usually states its own normalisation.

    Attributes:
        mean: of the pixel normalisation, per channel, for images in [0, 1]; None for that of the
            model's source.
        std: of the same.
    """

    mean: Colour | None = None
    std: Colour | None = None

    @model_validator(mode="after")
    def _check_pixels(self) -> Self:
        for key, value in (("mean", self.mean), ("std", self.std)):
            problem = None if value is None else _problem(key, value)
            if problem:
                raise ValueError(f"{key}: {problem}")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is not set, as before the keys existed: entries identify caches."""
        entry: dict[str, Any] = handler(self)
        return {k: v for k, v in entry.items() if k not in ("mean", "std") or v is not None}


class Pixels(NamedTuple):
    """Mean and standard deviation per channel, for images in [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]


def choose_pixels(
    where: str,
    config: NormalisedConfig,
    stated: Mapping[str, Any],
    source: str,
    assumed: tuple[Pixels, str] | None,
    *,
    random: bool = False,
) -> Pixels:
    """The normalisation of a teacher; says what was assumed, and what an entry overrules.

    Args:
        where: the teacher, for messages: `open_clip ViT-B-16`.
        config: its entry.
        stated: what its source states, `mean` and `std`; either may be missing or None.
        source: which source that is.
        assumed: the normalisation that is taken for what is not stated, and its origin in words;
            None if there is none to assume.
        random: whether the weights are random, so that no normalisation is wrong.

    Raises:
        TeacherError: the source states what is no normalisation of images in [0, 1], or states
            none and there is none to assume.
    """
    chosen, guessed = dict[str, Sequence[float]](), list[str]()
    for key in ("mean", "std"):
        own, theirs = getattr(config, key), stated.get(key)
        if own is not None:
            if theirs is not None and not _same(own, theirs):
                say_once(
                    f"{where}: {key} {_show(own)} of the entry is taken; {source} states "
                    f"{_show(theirs)}"
                )
            chosen[key] = own
        elif theirs is not None:
            chosen[key] = _colour(key, theirs, f"{where}: {source}")
        elif assumed is None:
            raise TeacherError(
                f"{where}: {source} states no {key}, and there is none to assume; set mean and std "
                "in the entry, for images in [0, 1]"
            )
        else:
            chosen[key] = getattr(assumed[0], key)
            guessed.append(f"{key} {_show(chosen[key])}")
    if guessed and assumed and not random:
        say_once(
            f"{where}: {' and '.join(guessed)} assumed, {assumed[1]}{_usual_name(assumed[0])}: "
            f"{source} states none; set mean and std in the entry if it was trained with others"
        )
    return Pixels(chosen["mean"], chosen["std"])


def say_conflict(
    where: str, taken: Mapping[str, Any], by: str, other: Mapping[str, Any], other_by: str
) -> None:
    """Says where two sources state different normalisations, of which the first is taken."""
    for key in ("mean", "std"):
        ours, theirs = _three(taken.get(key)), _three(other.get(key))
        if ours is not None and theirs is not None and not _same(ours, theirs):
            say_once(
                f"{where}: {key} {_show(ours)} of {by} is taken; {other_by} states {_show(theirs)}"
            )


def _usual_name(pixels: Pixels) -> str:
    usual = (name for name, known in _NAMES.items() if all(map(_close, known, pixels)))
    return next((f" ({name})" for name in usual), "")


def _colour(key: str, value: Any, where: str) -> Colour:
    """A stated value as three numbers."""
    value = _three(value)
    problem = _problem(key, value)
    if problem:
        raise TeacherError(f"{where}: {key}: {problem}; set it in the entry")
    return (value[0], value[1], value[2])


def _problem(key: str, value: Any) -> str | None:
    """What is wrong with a mean or std of images in [0, 1]."""
    try:
        numbers = [float(each) for each in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not all(map(isfinite, numbers)):
        return f"expected three numbers, one for each channel, got {value}"
    if key == "std" and min(numbers) <= 0:
        return f"must be positive in every channel, got {value}"
    if max(map(abs, numbers)) > 2:
        return f"is for images in [0, 1], got {value}; divide values for 0..255 by 255"
    return None


def _three(value: Any) -> Any:
    """One number stands for three."""
    return [value] * 3 if isinstance(value, int | float) else value


def _same(own: Any, theirs: Any) -> bool:
    pair = _three(own), _three(theirs)
    return all(_problem("mean", each) is None for each in pair) and _close(*pair)


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))


def _show(colour: Any) -> str:
    if _problem("mean", colour) is not None:
        return str(colour)
    return f"[{', '.join(f'{each:.4g}' for each in colour)}]"
