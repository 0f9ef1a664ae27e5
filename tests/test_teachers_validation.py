"""A mistyped key gets the keys of its own section, at any depth, and its own place."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

import distill.evaluation.suite as suite
from distill.benchmarks.build import BENCHMARKS
from distill.runtime.config import load_yaml, validate
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import StudentRecipe
from distill.tasks.upsampler_recipe import UpsamplerRecipe
from teachers.build import TEACHERS
from teachers.upsamplers.kinds import UPSAMPLERS
from teachers.validation import explain

WRONG = "zzzq"
ROOT = Path(__file__).parent.parent
Wrap = Callable[[Any], Any]


def kind_of(model: type[BaseModel]) -> dict[str, Any]:
    field = model.model_fields.get("kind")
    tags = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
    return {"kind": tags[0]} if tags else {}


def models_in(annotation: Any) -> Iterator[tuple[type[BaseModel], Wrap]]:
    """The models that an annotation allows, and how a value of theirs is wrapped there."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        root = annotation.model_fields.get("root")
        yield from models_in(root.annotation) if root else [(annotation, lambda value: value)]
        return
    of_mapping = get_origin(annotation) in (dict, Mapping)
    of_list = get_origin(annotation) in (list, tuple)
    for argument in get_args(annotation):
        for model, inner in models_in(argument):
            if of_mapping:
                yield model, lambda value, inner=inner: {"name": inner(value)}
            elif of_list:
                yield model, lambda value, inner=inner: [inner(value)]
            else:
                yield model, inner


def sections(model: type[BaseModel], wrap: Wrap, depth: int) -> Iterator[tuple[Any, Wrap]]:
    """Every model inside a model, and how a value of it becomes one of the outermost model."""
    for name, field in model.model_fields.items():
        for inner, inside in models_in(field.annotation):

            def whole(value: Any, name: str = name, inside: Wrap = inside) -> Any:
                return wrap({**kind_of(model), name: inside(value)})

            yield inner, whole
            if depth:
                yield from sections(inner, whole, depth - 1)


def test_every_section_of_every_recipe_suggests_its_own_keys() -> None:
    kinds = [
        registry.resolve(kind).Config
        for registry in (TEACHERS, UPSAMPLERS, BENCHMARKS)
        for kind in registry.table
        if kind != "hf"
    ]
    seen = 0
    for root in dict.fromkeys([StudentRecipe, UpsamplerRecipe, suite.SuiteRecipe, *kinds]):
        for model, whole in sections(root, lambda value: value, 2):
            if "kind" in model.model_fields and not kind_of(model):
                continue  # a registry's: its class validates it, as the outermost model here
            with pytest.raises(ValidationError) as caught:
                root.model_validate(whole({**kind_of(model), WRONG: 1}))
            lines = [line for line in explain(caught.value, root) if f"{WRONG}: " in line]
            keys = ", ".join(model.model_fields)
            assert any(line.endswith(f"choose from {keys}") for line in lines), (root, lines)
            seen += 1
    assert seen > 60


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"student": {"init": {"kind": "timm", "model": "x", "wieghts": "hub"}}},
            r"student.init.wieghts: unknown key \(did you mean 'weights'\?\); choose from kind, "
            "model, weights$",
        ),
        (
            {"arms": {"resolution": {"resolution": 64, "batch_size": 2, "teechers": ["x"]}}},
            r"arms.resolution.teechers: unknown key \(did you mean 'teachers'\?\)",
        ),
        (
            {"data": {"sources": [{"shards": "x", "weigth": 2}]}},
            r"^recipe: data.sources.0.weigth: unknown key \(did you mean 'weight'\?\); choose "
            "from shards, weight, crops$",
        ),
        (
            {"objective": {"equivariance": {"shfts": 3}}},
            "objective.equivariance.kind: required, but not given; choose one of shift, homography",
        ),
    ],
)
def test_a_mistake_is_told_at_its_own_place(changes: dict[str, Any], message: str) -> None:
    tree = load_yaml(ROOT / "recipes" / "quickstart.yaml")
    with pytest.raises(RecipeError, match=message):
        validate(StudentRecipe, tree | changes, "recipe")
