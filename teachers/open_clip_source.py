"""Finds an open_clip model: its architecture, what is stated of its pixels, and its weights file.

A name means a small teacher that this package ships, a local directory in hub layout (with or
without open_clip's `local-dir:`), a repository `hf-hub:ORG/NAME`, or a model of open_clip, in this
order. Nothing is built and no weights are read here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from teachers.errors import TeacherError
from teachers.files import SHIPPED
from teachers.messages import did_you_mean, took
from teachers.open_clip_stated import (
    CONFIG_NAME,
    Stated,
    check_activation,
    check_same_model,
    folder_states,
    repository_states,
    tag_states,
)
from teachers.pixels import say_conflict
from teachers.weights import download_failed, fetch, find_weights, on_meta, weights_in

_LOCAL, _HUB = "local-dir:", "hf-hub:"
_WEIGHT_NAMES = (  # open_clip's own order
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class OpenClipSource:
    """The model that a recipe names.

    Attributes:
        model: as in the recipe.
        weights: as in the recipe.
        model_cfg: open_clip's description of the architecture.
        stated: what the source of the weights states.
        folder: of a local model; None for one of open_clip's or of the hub.
    """

    model: str
    weights: str | None
    model_cfg: dict[str, Any]
    stated: Stated
    folder: Path | None

    @property
    def repository(self) -> str | None:
        """The hub's repository of a name `hf-hub:ORG/NAME`."""
        return self.model.removeprefix(_HUB) if self.model.startswith(_HUB) else None


def find_source(model: str, weights: str | None) -> OpenClipSource:
    """Finds a model; both arguments are as in `OpenClipConfig`.

    Raises:
        TeacherError: there is no such model, or a config beside the weights is of another model.
    """
    source = _find_model(model, weights)
    path = Path(weights) if weights is not None else None
    if path is None or not path.exists() or weights in _tags(source):
        return source
    beside = path if path.is_dir() else path.parent
    if source.folder is not None and beside.resolve() == source.folder.resolve():
        return source
    if not (beside / CONFIG_NAME).is_file():
        return source
    model_cfg, stated = folder_states(beside)  # the weights' own source decides
    check_same_model(model, source.model_cfg, model_cfg, beside / CONFIG_NAME)
    own = source.stated
    say_conflict(f"open_clip {model}", stated.preprocess, stated.by, own.preprocess, own.by)
    return OpenClipSource(model, weights, source.model_cfg, stated, source.folder)


def _find_model(model: str, weights: str | None) -> OpenClipSource:
    """The model by its name alone."""
    if model.startswith(_HUB):
        repository = model.removeprefix(_HUB)
        asked = f"the {CONFIG_NAME} of open_clip {model!r}"
        model_cfg, stated = _downloaded(asked, repository, lambda: repository_states(repository))
        return OpenClipSource(model, weights, model_cfg, stated, None)
    folder = _folder(model)
    if folder is not None:
        model_cfg, stated = folder_states(folder)
        return OpenClipSource(model, weights, model_cfg, stated, folder)
    built_in = open_clip.get_model_config(model)
    if built_in is None:
        shipped_names = [path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_NAME}")]
        hint = did_you_mean(model, [*open_clip.list_models(), *shipped_names])
        raise TeacherError(
            f"model: {model!r} is neither an open_clip model nor a shipped teacher nor a "
            f"directory{hint}; see open_clip.list_models()"
        )
    return OpenClipSource(model, weights, built_in, tag_states(model, weights), None)


def _folder(model: str) -> Path | None:
    """The directory of a local model; says which, if a name has several meanings."""
    if model.startswith(_LOCAL):
        folder = Path(model.removeprefix(_LOCAL))
        if not folder.is_dir():
            raise TeacherError(f"model: {model!r}: there is no directory {folder}")
        return folder
    found = dict[str, Path]()
    if "/" not in model and (SHIPPED / model / CONFIG_NAME).is_file():
        found["the shipped teacher"] = SHIPPED / model
    if Path(model).is_dir():
        found["the directory"] = Path(model)
    if not found:
        return None
    names = [*found, *(["open_clip's model"] if model in open_clip.list_models() else [])]
    took(f"model {model}", names[0], names, f"./{model} is always the directory")
    return found[names[0]]


def locate_weights(source: OpenClipSource) -> Path | None:
    """The weights file, downloaded if `weights` is a tag; None for random or meta weights.

    Raises:
        TeacherError: no such weights, or they cannot be downloaded.
    """
    weights, folder, repository = source.weights, source.folder, source.repository
    if weights == "none":
        return None
    if weights is None and folder is not None:
        return None if on_meta() else find_weights(folder, _WEIGHT_NAMES)
    if weights is None and repository is not None:
        asked = f"open_clip {source.model!r}"
        read = partial(download_pretrained_from_hf, repository)
        return None if on_meta() else _cached(_downloaded(asked, repository, read))
    tags = _tags(source)
    here = weights is not None and Path(weights).exists()
    if weights in tags:
        if here:
            took("weights", f"the tag {weights}", ["tag", "file"], f"a file may be ./{weights}")
        return None if on_meta() else _download(source)
    if not here:
        raise TeacherError(
            f"weights: {weights!r} is neither a tag of {source.model!r}"
            f"{did_you_mean(str(weights), tags)} nor a file or directory; choose one of "
            f"{tags}, a path, or none"
        )
    if on_meta():
        return None
    found = find_weights(Path(str(weights)), _WEIGHT_NAMES)
    check_activation(source.model, source.model_cfg, source.stated, found)
    return found


def _tags(source: OpenClipSource) -> list[str]:
    """The published weights that a recipe may name."""
    if source.folder is not None or source.repository is not None:
        return []
    return list(open_clip.list_pretrained_tags_by_model(source.model))


def _download(source: OpenClipSource) -> Path:
    model, weights = source.model, source.weights
    tag = open_clip.get_pretrained_cfg(model, weights)
    if tag.get("quick_gelu", False) != source.model_cfg.get("quick_gelu", False):
        raise TeacherError(
            f"weights: {weights!r} was trained {'with' if tag['quick_gelu'] else 'without'}"
            f" QuickGELU, unlike model {model!r}; use its other name, with or without -quickgelu"
        )
    try:
        return _cached(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        raise download_failed(
            f"open_clip {model!r} with weights {weights!r}", _how_to_fetch(tag), error
        ) from None


def _cached(file: str) -> Path:
    """A file in the hub's cache; says which, if the cache has others of its repository."""
    path = Path(file)
    if "snapshots" in path.parts:
        took(f"weights {path.parent}", path.name, weights_in(path.parent), "open_clip's choice")
    return path


def _downloaded(asked: str, repository: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (OSError, RuntimeError, ValueError) as error:
        wanted = f'{repository} --include "open_clip_*"'
        raise download_failed(asked, fetch(wanted, "model"), error) from None


def _how_to_fetch(tag: Mapping[str, Any]) -> str:
    repository, _, file = tag["hf_hub"].rpartition("/")  # `org/name/`, or with a file
    wanted = file or '--include "open_clip_*"'
    return fetch(f"{repository} {wanted}", "weights")
