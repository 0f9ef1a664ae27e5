"""Initial weights of a student that is a network of timm: those that timm publishes, or a file."""

from pathlib import Path
from typing import Any

import torch

from student.config import Colour, TimmInit
from student.errors import StudentError
from student.timm_config import TimmStudentConfig
from student.timm_file import read_timm_file, say_default_tag, timm_pixels
from student.timm_network import build_network
from student.timm_trunk import TimmTrunk


def load_timm_weights(trunk: TimmTrunk, config: TimmStudentConfig) -> tuple[Colour, Colour]:
    """Loads the weights that `config.weights` names into a trunk, all or none.

    Returns:
        The pixel mean and std that they were trained with.

    Raises:
        StudentError: they cannot be read, or are of another network.
    """
    assert config.weights != "none"
    where = f"student.weights: timm's {config.model}"
    if config.weights == "hub":
        source = _published(config, where)
    else:
        source = _from_file(config, config.weights, where)
    state, own = source.state_dict(), trunk.network.state_dict()
    trunk.network.load_state_dict({name: state[name] for name in own})
    init = TimmInit(kind="timm", model=config.model, weights=config.weights)
    stated = source.pretrained_cfg
    return timm_pixels(init, stated, where, assumes=config.mean is None, key="student.model")


def _published(config: TimmStudentConfig, where: str) -> Any:
    say_default_tag(config.model, where)
    try:
        return build_network(config.model, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise StudentError(
            f"{where}: its weights are not in the local cache and cannot be downloaded ({reason}); "
            "set student.weights to a local file, or to none for random ones"
        ) from None


def _from_file(config: TimmStudentConfig, path: Path, where: str) -> Any:
    """The whole network with the weights of a file, which timm converts as it does its own."""
    if not path.is_file():
        raise StudentError(f"{where}: no such file: {path}")
    state = read_timm_file(path, where)
    with torch.device("meta"):
        classifier = build_network(config.model).pretrained_cfg.get("classifier")
    head = state.get(f"{classifier}.weight") if isinstance(classifier, str) else None
    # timm loads strictly only where it drops no classifier, so the network has that of the file.
    classes = 0 if head is None else head.shape[0]
    overlay = {"state_dict": state, "num_classes": classes, "source": "", "label_offset": 0}
    try:
        return build_network(
            config.model, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StudentError(f"{where}: {path} is for another model: {reason}") from None
