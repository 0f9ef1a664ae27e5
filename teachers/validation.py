"""Translates pydantic's validation errors: the place, what was expected, what came, the cure."""

from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, RootModel, ValidationError

from teachers.messages import did_you_mean

# Where pydantic names Python's own types.
_PLAIN = {
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping",
    "tuple_type": "expected a list",
}


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line for each mistake in `model`: `run.stepz: unknown key (did you mean 'steps'?)`."""
    items = _without_other_branches(error.errors(include_url=False))
    return [_line(model, item) for item in items]


def _without_other_branches(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where a word or a mapping is allowed: the mistakes of the branch that was given.

    A list is not too short where its items are wrong: pydantic counts the right ones.
    """
    kept = []
    for item in items:
        place = item["loc"]
        if item["type"] == "too_short" and any(
            other["loc"][: len(place)] == place and other is not item for other in items
        ):
            continue
        word = any(str(step).startswith("literal[") for step in item["loc"])
        section = item["type"] in ("model_type", "model_attributes_type")
        other = (word and isinstance(item["input"], dict)) or (
            section and isinstance(item["input"], str)
        )
        if not other:
            kept.append(item)
    return kept or list(items)


def _line(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    location, here = _walk(model, item["loc"])
    kind, context = item["type"], item.get("ctx", {})
    if kind == "union_tag_invalid":
        known = _words(context["expected_tags"])
        hint = did_you_mean(context["tag"], known)
        location.append("kind")
        message = f"{context['tag']!r} is unknown{hint}; choose one of {', '.join(known)}"
    elif kind == "union_tag_not_found":
        location.append(context["discriminator"].strip("'"))
        known = [tag for each in here for tag in _tags(each)]
        message = f"required, but not given; choose one of {', '.join(known)}"
    elif kind == "extra_forbidden":
        known = _keys(_walk(model, item["loc"][:-1])[1])
        allowed = f"; choose from {', '.join(known)}" if known else ""
        message = f"unknown key{did_you_mean(location[-1], known)}{allowed}"
    elif kind == "missing":
        message = "required, but not given"
    elif kind == "value_error":  # raised by our own validators, which include the value
        message = str(context["error"])
    else:
        message = _PLAIN.get(kind, item["msg"][0].lower() + item["msg"][1:])
        if kind == "too_short":
            least = context["min_length"]
            message = f"expected at least {least} {'item' if least == 1 else 'items'}"
        message += f", got {item['input']!r}"
        if kind == "literal_error" and isinstance(item["input"], str):
            message += did_you_mean(item["input"], _words(context["expected"]))
    return ": ".join([*filter(None, [".".join(location)]), message])


def _words(quoted: str) -> list[str]:
    """`'a', 'b' or 'c'` as a list."""
    return quoted.replace("'", "").replace(" or ", ", ").split(", ")


def _walk(model: type[BaseModel], steps: Sequence[str | int]) -> tuple[list[str], list[Any]]:
    """A place in a recipe as its reader sees it, and the types that are allowed there.

    Steps of pydantic's own, such as the branch of a union, are not part of the place.
    """
    here, shown = [model], list[str]()
    for step in steps:
        below = [each for owner in here for each in _below(owner, step)]
        branch = [each for each in here if step in (*_tags(each), getattr(each, "__name__", None))]
        if branch and not any(get_origin(each) is dict for each in here):
            here = branch
        elif "[" not in str(step):
            shown.append(str(step))
            here = [each for annotation in below for each in _allowed(annotation)]
    return shown, here


def _allowed(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows, each model, dict or list on its own."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _allowed(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for branch in get_args(annotation):
            yield from _allowed(branch)
    elif isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from _allowed(annotation.model_fields["root"].annotation)
    else:
        yield annotation


def _below(owner: Any, step: str | int) -> Iterator[Any]:
    """What may stand at a key of a model or a mapping, or at a place of a list."""
    if isinstance(owner, type) and issubclass(owner, BaseModel):
        for name, field in owner.model_fields.items():
            if step in (name, field.alias):
                yield field.annotation
    elif isinstance(get_origin(owner), type) and issubclass(get_origin(owner), Mapping):
        yield get_args(owner)[1]
    elif isinstance(step, int):
        yield from (each for each in get_args(owner) if each is not Ellipsis)


def _tags(owner: Any) -> list[Any]:
    """The words by which a union tells a model from its others: its `kind: Literal[...]`."""
    if not (isinstance(owner, type) and issubclass(owner, BaseModel)):
        return []
    kind = owner.model_fields.get("kind")
    return (
        list(get_args(kind.annotation)) if kind and get_origin(kind.annotation) is Literal else []
    )


def _keys(owners: Sequence[Any]) -> list[str]:
    """The keys of the models among some types."""
    models = [each for each in owners if isinstance(each, type) and issubclass(each, BaseModel)]
    return list(dict.fromkeys(key for model in models for key in model.model_fields))
