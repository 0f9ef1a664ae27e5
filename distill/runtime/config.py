"""Reads recipes: YAML with overrides, validated by pydantic models with strict keys.

YAML is read as version 1.2, where `1e-4` is a number, `off` is a string and a duplicate key is an
error. The pydantic models are defined beside the classes that they configure. No other module
imports a YAML library.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from data.errors import similar_path
from distill.runtime.errors import RecipeError
from teachers.validation import explain

Model = TypeVar("Model", bound=BaseModel)


def load_recipe(kind: type[Model], path: Path, overrides: Sequence[str]) -> Model:
    """Reads a recipe of a kind and applies `section.key=value` overrides.

    Raises:
        RecipeError: lists every error with its path.
    """
    tree = load_yaml(path)
    apply_overrides(tree, overrides)
    return validate(kind, tree, str(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML 1.2 mapping.

    Raises:
        RecipeError: no such file, not YAML, a duplicate key, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = similar_path(path)
        raise RecipeError(f"{path}: cannot be read ({error.strerror}){hint}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: byte {error.start} is not UTF-8; save the recipe as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Parses a YAML 1.2 mapping from a source that messages name (`where`).

    Raises:
        RecipeError: not YAML, a duplicate key, or not a mapping.
    """
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise RecipeError(f"{where}: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of sections, got {type(value).__name__}")
    return value


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Writes a mapping as YAML, in the order of its keys."""
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes are typed as what they start with
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(dict(value), stream)
    return stream.getvalue()


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `a.b.c=value` in a nested mapping, in place; values are parsed as YAML.

    Raises:
        RecipeError: not of the form `key=value`, or a parent is not a mapping or list.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(f"override '{override}': write it as section.key=value")
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError as error:
            raise RecipeError(f"override '{override}': {_one_line(error)}") from None
        *parents, last = path.split(".")
        node: Any = tree
        for depth, part in enumerate(parents):
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = _child(node, part, override, ".".join(parents[:depth]))
        if isinstance(node, list):
            _child(node, last, override, ".".join(parents))
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise RecipeError(f"override '{override}': {'.'.join(parents)} is not a mapping")


def validate(model: type[Model], value: Mapping[str, Any], where: str) -> Model:
    """Validates a mapping from a source that messages name (`where`), such as a file name.

    Errors show the path and the closest valid key.

    Raises:
        RecipeError: lists every error, one a line.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = explain(error, model)
        text = f"{where}: {lines[0]}" if len(lines) == 1 else "\n  ".join([where, *lines])
        raise RecipeError(text) from None


def _child(node: Any, part: str, override: str, parent: str) -> Any:
    if isinstance(node, dict):
        return node[part]
    if isinstance(node, list):
        if part.isdigit() and int(part) < len(node):
            return node[int(part)]
        raise RecipeError(
            f"override '{override}': {parent} is a list of {len(node)}; "
            f"'{part}' is not one of 0 to {len(node) - 1}"
        )
    raise RecipeError(f"override '{override}': {parent} is not a mapping")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
