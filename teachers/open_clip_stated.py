"""What the source of an open_clip model states: pixel normalisation, size and activation."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import _get_hf_config
from open_clip.model import CLIPVisionCfg

from teachers.errors import TeacherError
from teachers.messages import say_once
from teachers.normalization import OPENAI_MEAN, OPENAI_STD
from teachers.pixels import Pixels
from teachers.weights import read_json

CONFIG_NAME = "open_clip_config.json"
_OPEN_CLIPS = Pixels(OPENAI_MEAN, OPENAI_STD), "open_clip's default"
_QUICK = "-quickgelu"
# They change no feature, or a strict load of the weights shows their difference.
_HARMLESS = {"timm_model_pretrained", "timm_drop", "timm_drop_path"}
_HARMLESS |= {"image_size", "patch_dropout", "output_tokens"}


@dataclass(frozen=True)
class Stated:
    """What a source states.

    Attributes:
        by: the source, in words.
        preprocess: of `mean`, `std` and `size` those that it states.
        assumed: what stands for a `mean` or `std` that it does not state, and its origin in words;
            None if there is no good guess.
        quick_gelu: whether the activation is QuickGELU; None if it does not say.
    """

    by: str
    preprocess: Mapping[str, Any]
    assumed: tuple[Pixels, str] | None = _OPEN_CLIPS
    quick_gelu: bool | None = None


def folder_states(folder: Path) -> tuple[dict[str, Any], Stated]:
    """The `model_cfg` of a directory in hub layout, and what its config states.

    Raises:
        TeacherError: there is no config, or it describes no model.
    """
    return _split(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME), folder)


def repository_states(repository: str) -> tuple[dict[str, Any], Stated]:
    """The same of a repository on the hub, whose config open_clip downloads or finds cached."""
    return _split(_get_hf_config(repository), f"the {CONFIG_NAME} of {repository}", None)


def _split(stored: dict[str, Any], by: str, folder: Path | None) -> tuple[dict[str, Any], Stated]:
    model_cfg = stored.get("model_cfg")
    if not isinstance(model_cfg, dict):
        raise TeacherError(f"{by} has no model_cfg")
    for key, kind in (("embed_dim", int), ("vision_cfg", dict)):
        if not isinstance(model_cfg.get(key), kind):
            raise TeacherError(f"{by}: its model_cfg has no {key}")
    vision_cfg = model_cfg["vision_cfg"]
    try:
        CLIPVisionCfg(**vision_cfg)
    except TypeError as error:
        raise TeacherError(f"{by}: vision_cfg: {error}; is it of a later open_clip?") from None
    name = vision_cfg.get("timm_model_name") or ""
    if folder is not None and name.startswith("local-dir:"):  # relative to the folder
        vision_cfg["timm_model_name"] = f"local-dir:{folder / name.removeprefix('local-dir:')}"
    given = stored.get("preprocess_cfg") or {}
    if not isinstance(given, dict):
        raise TeacherError(f"{by}: preprocess_cfg: expected a mapping, got {given!r}")
    preprocess = {key: value for key, value in given.items() if value is not None}
    return model_cfg, Stated(by, preprocess, quick_gelu=bool(model_cfg.get("quick_gelu", False)))


def tag_states(model: str, weights: str | None) -> Stated:
    """What open_clip states of published weights; of others, what all those of a model share."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights in tags:
        tag = open_clip.get_pretrained_cfg(model, weights)
        return Stated(f"open_clip's tag {weights!r}", tag, quick_gelu=tag.get("quick_gelu", False))
    by = f"weights {weights!r}"
    shared = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    pixels = [Pixels(tag["mean"], tag["std"]) for tag in shared]
    if not pixels:
        return Stated(by, {})
    if any(other != pixels[0] for other in pixels) and weights != "none":
        return Stated(by, {}, assumed=None)
    return Stated(by, {}, assumed=(pixels[0], f"that of the weights published for {model}"))


def check_activation(model: str, model_cfg: Mapping[str, Any], stated: Stated, file: Path) -> None:
    """Says which activation was assumed, where a model exists with both."""
    if stated.quick_gelu is not None:
        return
    other = model.removesuffix(_QUICK) if model.endswith(_QUICK) else f"{model}{_QUICK}"
    if other in open_clip.list_models():
        ours = "QuickGELU" if model_cfg.get("quick_gelu", False) else "GELU"
        say_once(
            f"open_clip {model}: activation {ours} assumed, that of the model's name; {file} "
            f"states none, and {other} has the other one (OpenAI's and DFN's weights: QuickGELU)"
        )


def check_same_model(
    model: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], config: Path
) -> None:
    """Checks that the config beside some weights describes the model that was named.

    Raises:
        TeacherError: it states another activation or tower, which need not show in the weights.
    """
    quick = [bool(each.get("quick_gelu", False)) for each in (ours, theirs)]
    pairs: list[tuple[str, Any, Any]] = [("quick_gelu", quick[0], quick[1])]
    towers = [asdict(CLIPVisionCfg(**each["vision_cfg"])) for each in (ours, theirs)]
    pairs += [(f"vision_cfg.{key}", towers[0][key], towers[1][key]) for key in towers[0]]
    for key, own, stated in pairs:
        local = "local-dir:" in f"{own}{stated}"  # the same model by another path
        if own != stated and not local and key.removeprefix("vision_cfg.") not in _HARMLESS:
            raise TeacherError(
                f"weights: {config} states {key} {stated}, but model {model!r} has {own}; give "
                f"model: {config.parent} for what was trained, or move the config away"
            )
