"""Finds an open_clip model: its architecture, pixel normalisation and weights file.

A name means a small teacher that this package ships, a local directory in hub layout, or a model
of open_clip, in this order. Nothing is built and no weights are read here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from teachers.errors import TeacherError
from teachers.messages import did_you_mean
from teachers.weights import download_failed, fetch, find_weights, on_meta, read_json

SHIPPED = Path(__file__).parent / "small"
_CONFIG_NAME = "open_clip_config.json"
_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)


@dataclass(frozen=True)
class OpenClipSource:
    """The model that a recipe names.

    Attributes:
        model: as in the recipe.
        weights: as in the recipe.
        model_cfg: open_clip's description of the architecture.
        preprocess_cfg: the known part of the pixel normalisation; the rest is open_clip's default.
        folder: of a local model; None for one of open_clip's.
    """

    model: str
    weights: str | None
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    folder: Path | None


def find_source(model: str, weights: str | None) -> OpenClipSource:
    """Finds a model; both arguments are as in `OpenClipConfig`.

    Raises:
        TeacherError: there is no such model, or its pixel normalisation is ambiguous.
    """
    shipped = SHIPPED / model
    folder = shipped if (shipped / _CONFIG_NAME).is_file() else Path(model)
    if folder.is_dir():
        stored = read_json(folder / _CONFIG_NAME)
        if "model_cfg" not in stored:
            raise TeacherError(f"{folder / _CONFIG_NAME} has no model_cfg")
        vision_cfg = stored["model_cfg"]["vision_cfg"]
        name = vision_cfg.get("timm_model_name") or ""
        if name.startswith("local-dir:"):  # relative to the folder
            vision_cfg["timm_model_name"] = f"local-dir:{folder / name.removeprefix('local-dir:')}"
        preprocess_cfg = stored.get("preprocess_cfg", {})
        return OpenClipSource(model, weights, stored["model_cfg"], preprocess_cfg, folder)
    model_cfg = open_clip.get_model_config(model)
    if model_cfg is None:
        shipped_names = [path.parent.name for path in SHIPPED.glob(f"*/{_CONFIG_NAME}")]
        hint = did_you_mean(model, [*open_clip.list_models(), *shipped_names])
        raise TeacherError(
            f"model: {model!r} is neither an open_clip model nor a shipped teacher nor a "
            f"directory{hint}; see open_clip.list_models()"
        )
    return OpenClipSource(model, weights, model_cfg, _published_preprocess(model, weights), None)


def locate_weights(source: OpenClipSource) -> Path | None:
    """The weights file, downloaded if `weights` is a tag; None for random or meta weights.

    Raises:
        TeacherError: no such weights, or they cannot be downloaded.
    """
    weights, folder = source.weights, source.folder
    if weights == "none":
        return None
    if weights is None and folder is not None:
        return None if on_meta() else find_weights(folder, _WEIGHT_NAMES)
    tags = [] if folder is not None else open_clip.list_pretrained_tags_by_model(source.model)
    if weights in tags:
        return None if on_meta() else _download(source)
    if weights is None or not Path(weights).exists():
        raise TeacherError(
            f"weights: {weights!r} is neither a tag of {source.model!r}"
            f"{did_you_mean(str(weights), tags)} nor a file or directory; choose one of "
            f"{tags}, a path, or none"
        )
    return None if on_meta() else find_weights(Path(weights), _WEIGHT_NAMES)


def _published_preprocess(model: str, weights: str | None) -> dict[str, Any]:
    """The pixel normalisation of a tag; without a tag, that of all the model's tags."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    used = [weights] if weights in tags else tags
    found = [open_clip.get_pretrained_cfg(model, tag) for tag in used]
    chosen = [{k: c[k] for k in ("mean", "std") if k in c} for c in found]
    if weights != "none" and any(other != chosen[0] for other in chosen):
        raise TeacherError(
            f"weights: the published weights of {model!r} differ in mean and std; put "
            f"the file in a directory with its {_CONFIG_NAME} and give that as model"
        )
    return chosen[0] if chosen else {}


def _download(source: OpenClipSource) -> Path:
    model, weights = source.model, source.weights
    tag = open_clip.get_pretrained_cfg(model, weights)
    if tag.get("quick_gelu", False) != source.model_cfg.get("quick_gelu", False):
        raise TeacherError(
            f"weights: {weights!r} was trained {'with' if tag['quick_gelu'] else 'without'}"
            f" QuickGELU, unlike model {model!r}; use its other name, with or without -quickgelu"
        )
    try:
        return Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        raise download_failed(
            f"open_clip {model!r} with weights {weights!r}", _how_to_fetch(tag), error
        ) from None


def _how_to_fetch(tag: dict[str, Any]) -> str:
    repository, _, file = tag["hf_hub"].rpartition("/")  # `org/name/`, or with a file
    wanted = file or '--include "open_clip_*"'
    return fetch(f"{repository} {wanted}", "weights")
