"""The metadata of Hugging Face's hub at the top of a model card: what its search and pages read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.text import shown
from distill.runtime.config import parse_yaml
from distill.runtime.errors import RecipeError

MARK = "featsharp-distill"  # among the tags of every card of ours
_LIBRARIES = {"hf": "transformers", "onnx": "onnx"}
_TAGS = ("vision", "feature-extraction", "distillation", "agglomerative", MARK)
_MORE_TAGS = {"hf": ("radio",), "radio": ("radio",)}
_TASK = "image-feature-extraction"

_DATASET = re.compile(r"(?:huggingface\.co|hf:/)/datasets/([\w.-]+/[\w.-]+)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_OPEN_CLIP = ("dfn_clip", "siglip", "open_clip")


def hub_metadata(
    name: str,
    format: str,
    licence: str,
    recipe: Mapping[str, Any],
    results: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """The metadata of a card; keys without a value are left out.

    Args:
        name: of the model.
        format: of its file, see `export.FORMATS`.
        licence: the hub's identifier.
        recipe: of the training; empty where it is not known.
        results: rows with `teacher`, `resolution` and numbers by name.
    """
    sources = (recipe.get("data") or {}).get("sources") or []
    found = {
        "library_name": _LIBRARIES.get(format, MARK),
        "pipeline_tag": _TASK,
        "license": licence,
        "base_model": sorted(filter(None, map(_repository, recipe.get("teachers", {}).values()))),
        "datasets": sorted(set(_DATASET.findall(str(sources)))),
        "tags": [*_TAGS, *_MORE_TAGS.get(format, ())],
        "model-index": _model_index(name, results),
    }
    return {key: value for key, value in found.items() if value}


def read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        RecipeError: it has none, or they are no YAML.
    """
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        raise RecipeError(f"{path}: does not begin with metadata between two lines of ---")
    return parse_yaml(parts[1], str(path))


def _model_index(name: str, results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    metrics = dict[str, list[dict[str, Any]]]()
    for each in results:
        size, teacher = "{} x {} px".format(*each["resolution"]), shown(each["teacher"])
        metrics.setdefault(size, []).extend(
            {"type": key, "name": f"{key.replace('_', ' ')} to {teacher}", "value": round(value, 4)}
            for key, value in each.items()
            if isinstance(value, float)
        )
    rows = [
        {
            "task": {"type": _TASK},
            "dataset": {"type": "held-out", "name": f"held-out images at {size}"},
            "metrics": found,
        }
        for size, found in metrics.items()
    ]
    return [{"name": shown(name), "results": rows}] if rows else []


def _repository(entry: Mapping[str, Any]) -> str | None:
    """The hub's repository of a teacher's weights; None where it is not certain."""
    kind, model, weights = (entry.get(key) for key in ("kind", "model", "weights"))
    if kind == "student":
        return _of_url(str(entry.get("path")))
    if weights == "none" or not isinstance(model, str):
        return None
    if kind in _OPEN_CLIP:
        return _of_open_clip(model, weights)
    if kind == "timm" and weights is None:
        import timm

        known = timm.is_model_pretrained(model) and timm.get_pretrained_cfg(model)
        return (known and known.hf_hub_id) or None
    if kind == "hf" and _REPOSITORY.fullmatch(model) and not Path(model).is_dir():
        return model
    if kind == "radio":
        from teachers.radio_hub import repository
        from teachers.radio_models import PUBLISHED  # builds timm's models

        return repository(model) if model in PUBLISHED else None
    return None


def _of_open_clip(model: str, weights: str | None) -> str | None:
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:")
    import open_clip

    tag = open_clip.get_pretrained_cfg(model, str(weights)) or {}
    return tag.get("hf_hub", "").rpartition("/")[0] or None


def _of_url(path: str) -> str | None:
    found = re.match(r"hf:/{1,2}([^/@\s]+/[^/@\s]+)", path)
    return found[1] if found else None
