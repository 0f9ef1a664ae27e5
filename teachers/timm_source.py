"""Builds a timm model without its classifier and loads its weights, both through timm.

A name means a local directory in hub layout or a timm model, in this order.
"""

from pathlib import Path
from typing import Any

import timm
import torch

from teachers.errors import TeacherError
from teachers.messages import did_you_mean
from teachers.weights import (
    download_failed,
    fetch,
    find_weights,
    on_meta,
    read_tensors,
    seeded,
    shorten,
)

_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def build_network(model: str, weights: str | None, resolution: tuple[int, int] | None) -> Any:
    """A timm model without its classifier; the arguments are as in `TimmConfig`.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or no feature maps.
    """
    name, kwargs = _name(model), dict[str, Any]()
    if resolution is not None:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, pretrained=False)
        if hasattr(probe, "dynamic_img_size"):
            kwargs["dynamic_img_size"] = True
        elif not resamples(probe) and probe.pretrained_cfg.get("fixed_input_size", False):
            raise TeacherError(
                f"resolution: {model!r} takes only the size it was trained at, "
                f"{probe.pretrained_cfg['input_size'][1:]}"
            )
    if weights is None:
        kwargs["pretrained"] = not on_meta()
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


def _name(model: str) -> str:
    """The name of the model for `timm.create_model`."""
    if Path(model).is_dir():
        return f"local-dir:{model}"
    if ":" not in model and not timm.is_model(model):
        architecture = model.split(".")[0]
        raise TeacherError(
            f"model: {model!r} is neither a timm model nor a directory"
            f"{did_you_mean(architecture, timm.list_models())}; see timm.list_models()"
        )
    return model


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
    tensors = read_tensors(path)
    with torch.device("meta"):
        probe: Any = timm.create_model(name, pretrained=False)
    classifier = probe.pretrained_cfg.get("classifier")
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
    except RuntimeError as error:
        origin = weights or "its published weights"
        raise TeacherError(f"{asked} from {origin}: {shorten(str(error))}") from None


def _how_to_fetch(model: str) -> str:
    published = timm.get_pretrained_cfg(model)
    if published is None or not published.hf_hub_id:
        return f"Copy its {_WEIGHT_NAMES[0]} here and give that path as weights"
    file = published.hf_hub_filename or _WEIGHT_NAMES[0]
    return fetch(f"{published.hf_hub_id} {file}", "weights")
