"""Translates pydantic's validation errors: the place, what was expected, what came, the cure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

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
    """Where a word or a mapping is allowed: the mistakes of the branch that was given."""
    kept = []
    for item in items:
        word = any(str(step).startswith("literal[") for step in item["loc"])
        section = item["type"] in ("model_type", "model_attributes_type")
        other = (word and isinstance(item["input"], dict)) or (
            section and isinstance(item["input"], str)
        )
        if not other:
            kept.append(item)
    return kept or list(items)


def _line(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    location = [str(step) for step in item["loc"] if "[" not in str(step)]  # pydantic's own steps
    kind, context = item["type"], item.get("ctx", {})
    if kind == "union_tag_invalid":
        known = _words(context["expected_tags"])
        hint = did_you_mean(context["tag"], known)
        location.append("kind")
        message = f"{context['tag']!r} is unknown{hint}; choose one of {', '.join(known)}"
    elif kind == "extra_forbidden":
        known = _known_keys(model, item["loc"][:-1])
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


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that are allowed at a place in a recipe, as far as the types tell."""
    models = [model]
    for step in location:
        found = [m for owner in models for m in _models_at(owner, step)]
        models = found or models
    return list(dict.fromkeys(key for m in models for key in m.model_fields))


def _models_at(owner: type[BaseModel], step: str | int) -> Iterator[type[BaseModel]]:
    if isinstance(step, str) and step in owner.model_fields:
        yield from _models_in(owner.model_fields[step].annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from _models_in(annotation.model_fields["root"].annotation)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
