"""Builds a timm model without its classifier and loads its weights, both through timm.

A name means a teacher that this package ships, a local directory in hub layout, or a timm model, in
this order. A timm `config.json`
beside a weights file describes these weights, as in such a directory.
"""

from pathlib import Path
from typing import Any

import timm
import torch

from teachers.errors import TeacherError
from teachers.files import SHIPPED, TIMM_SETS
from teachers.messages import did_you_mean, took
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD
from teachers.pixels import NormalisedConfig, Pixels, choose_pixels, say_conflict
from teachers.weights import (
    download_failed,
    fetch,
    find_weights,
    on_meta,
    read_json,
    read_tensors,
    seeded,
    shorten,
)

_LOCAL, _HUB = "local-dir:", "hf-hub:"
_CONFIG_NAME = "config.json"
_WEIGHT_NAMES = (  # timm's own order
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


def build_network(model: str, weights: str | None, resolution: tuple[int, int] | None) -> Any:
    """A timm model without its classifier; the arguments are as in `TimmConfig`.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or no feature maps.
    """
    name, kwargs = _name(model, weights), dict[str, Any]()
    if weights is None and _folder(name) is not None and not on_meta():
        weights = str(_folder(name))
    if resolution is not None:
        with torch.device("meta"):
            probe = _create(name, model, weights, {"pretrained": False})
        if hasattr(probe, "dynamic_img_size"):
            kwargs["dynamic_img_size"] = True
        elif not resamples(probe) and probe.pretrained_cfg.get("fixed_input_size", False):
            raise TeacherError(
                f"resolution: {model!r} takes only the size it was trained at, "
                f"{probe.pretrained_cfg['input_size'][1:]}"
            )
    if weights is None:
        kwargs["pretrained"] = not on_meta()
        if not on_meta():
            _say_tag(model)
    elif weights != "none":
        kwargs |= _local_weights(model, weights, name)
    with seeded(loaded=kwargs.get("pretrained", False)):
        network = _create(name, model, weights, kwargs)
    if not hasattr(network, "forward_intermediates"):
        raise TeacherError(f"model: timm returns no feature maps of {model!r}")
    network.reset_classifier(0)
    return network


def resamples(network: Any) -> bool:
    """Whether a model interpolates its positions to any image size, as timm's SAM does."""
    return getattr(getattr(network, "patch_embed", None), "strict_img_size", None) is False


def pixels_of(config: NormalisedConfig, model: str, weights: str | None, network: Any) -> Pixels:
    """The normalisation of a built network; `model` and `weights` are as in `TimmConfig`.

    Raises:
        TeacherError: its source states what is no normalisation.
    """
    name = _name(model, weights)
    folder, registered = _folder(name), timm.get_pretrained_cfg(model.partition(":")[0])
    assumed = Pixels(IMAGENET_MEAN, IMAGENET_STD), "timm's default"
    if registered is not None:
        tag = "" if "." in model or not registered.tag else f".{registered.tag}"
        assumed = Pixels(registered.mean, registered.std), f"that of timm's {model}{tag}"
        others = [timm.get_pretrained_cfg(each) for each in timm.list_pretrained(f"{model}.*")]
        if any(each is not None and each.mean != registered.mean for each in others):
            assumed = assumed[0], f"{assumed[1]} though other weights of that name have another"
    stated: Any = network.pretrained_cfg
    source = f"timm's {model}"
    if folder is not None:
        stored = read_json(folder / _CONFIG_NAME)
        stated, source = stored.get("pretrained_cfg", stored), str(folder / _CONFIG_NAME)
        own, by = _stated_by_name(model)
        say_conflict(f"timm {model}", stated, source, own, by)
    elif weights not in (None, "none") and "." not in model and ":" not in model:
        stated, source = {}, f"weights {weights!r}"  # a name without a tag states none
    return choose_pixels(f"timm {model}", config, stated, source, assumed, random=weights == "none")


def _stated_by_name(model: str) -> tuple[dict[str, Any], str]:
    """What a model's name alone states: the config of its directory, or its published tag."""
    folder = _folder(_named(model))
    if folder is not None:
        stored = read_json(folder / _CONFIG_NAME)
        return stored.get("pretrained_cfg", stored), str(folder / _CONFIG_NAME)
    published = timm.get_pretrained_cfg(model) if "." in model and ":" not in model else None
    return (published.to_dict() if published else {}), f"timm's {model}"


def _name(model: str, weights: str | None) -> str:
    """The name of the model for `timm.create_model`.

    Raises:
        TeacherError: there is no such model, or the config beside the weights is of another one.
    """
    name = _named(model)
    path = Path(weights) if weights not in (None, "none") else None
    if path is None or not path.exists():
        return name
    beside = path if path.is_dir() else path.parent
    config = beside / _CONFIG_NAME
    if not config.is_file() or "architecture" not in read_json(config):
        return name
    folder, theirs = _folder(name), read_json(config)["architecture"]
    ours = model.split(".")[0]
    if folder is not None:
        ours = read_json(folder / _CONFIG_NAME)["architecture"]
    if ":" not in ours and ours != theirs:
        raise TeacherError(
            f"weights: {config} states the architecture {theirs!r}, but model {model!r} is "
            f"{ours!r}; give model: {beside} for what was trained, or move the config away"
        )
    return f"{_LOCAL}{beside}"


def _named(model: str) -> str:
    """The name of the model for `timm.create_model`, by its entry alone."""
    if model in shipped_models():
        if Path(model).is_dir():
            both = ["the shipped teacher", "the directory"]
            took(f"model {model}", both[0], both, f"./{model} is always the directory")
        model = f"{_LOCAL}{SHIPPED / model}"
    elif Path(model).is_dir():
        if timm.is_model(model):
            both = ["the directory", "timm's model"]
            took(f"model {model}", both[0], both, "rename the directory for the other")
        model = f"{_LOCAL}{model}"
    folder = _folder(model)
    if folder is not None and "architecture" not in read_json(folder / _CONFIG_NAME):
        raise TeacherError(f"{folder / _CONFIG_NAME} names no architecture of timm")
    if ":" not in model and not timm.is_model(model):
        architecture = model.split(".")[0]
        raise TeacherError(
            f"model: {model!r} is neither a timm model nor a shipped teacher nor a directory"
            f"{did_you_mean(architecture, [*timm.list_models(), *shipped_models()])}; see "
            "timm.list_models()"
        )
    if "." in model and ":" not in model:
        tagged = timm.list_models(f"{model.partition('.')[0]}.*", pretrained=True)
        try:
            timm.get_pretrained_cfg(model)
        except RuntimeError:
            raise TeacherError(
                f"model: timm has no tag of {model!r}{did_you_mean(model, tagged)}; choose one of "
                f"{tagged}"
            ) from None
    return model


def shipped_models() -> list[str]:
    """The names of this package's teachers for timm; open_clip's have weights of another name."""
    found = SHIPPED.glob(f"*/{_WEIGHT_NAMES[0]}")
    return sorted(each.parent.name for each in found if (each.parent / _CONFIG_NAME).is_file())


def _folder(name: str) -> Path | None:
    """The directory of a local model's name."""
    return Path(name.removeprefix(_LOCAL)) if name.startswith(_LOCAL) else None


def _say_tag(model: str) -> None:
    """Says which published weights a name without a tag stands for."""
    if "." in model or ":" in model:
        return
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]
    published = timm.get_pretrained_cfg(model)
    if published is not None and published.tag:
        took(f"timm {model}", f"the tag {published.tag}", tags, "timm's default")


def _local_weights(model: str, weights: str, name: str) -> dict[str, Any]:
    """Arguments with which timm loads a local file, including its own conversions."""
    path = Path(weights)
    if not path.exists():
        raise TeacherError(
            f"weights: {weights!r} is not a file or directory; leave weights out for those that "
            f"timm publishes as {model!r}, or give a path or none"
        )
    path = find_weights(path, _WEIGHT_NAMES)
    if on_meta():
        return {}
    tensors = read_tensors(path, order=TIMM_SETS)
    with torch.device("meta"), seeded(loaded=True):
        probe = _create(name, model, weights, {"pretrained": False})
    known = timm.get_pretrained_cfg(probe.pretrained_cfg.get("architecture", ""))
    classifier = probe.pretrained_cfg.get("classifier") or getattr(known, "classifier", None)
    head = tensors.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    # timm loads strictly only if it drops no classifier, so build the classifier of the file.
    num_classes = 0 if head is None else head.shape[0]
    overlay = {"state_dict": tensors, "num_classes": num_classes, "source": "", "label_offset": 0}
    return {"pretrained": True, "num_classes": num_classes, "pretrained_cfg_overlay": overlay}


def _create(name: str, model: str, weights: str | None, kwargs: dict[str, Any]) -> Any:
    asked = f"timm {model!r}"
    try:
        return timm.create_model(name, **kwargs)
    except OSError as error:
        raise download_failed(
            f"{asked} with its published weights", _how_to_fetch(model), error
        ) from None
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        origin = weights or "its published weights"  # a config may break timm anywhere
        raise TeacherError(f"{asked} from {origin}: {shorten(str(error))}") from None


def _how_to_fetch(model: str) -> str:
    if model.startswith(_HUB):
        return fetch(model.removeprefix(_HUB), "model")
    published = timm.get_pretrained_cfg(model)
    if published is None or not published.hf_hub_id:
        return f"Copy its {_WEIGHT_NAMES[0]} here and give that path as weights"
    file = published.hf_hub_filename or _WEIGHT_NAMES[0]
    # The config beside the file states what a name without a tag does not.
    config = "" if "." in model else f" {_CONFIG_NAME}"
    return fetch(f"{published.hf_hub_id} {file}{config}", "weights")
