"""Reads a file of a timm model for initial weights, and what is stated of its pixels."""

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from student.config import Colour, TimmInit
from student.errors import StudentError
from teachers.files import TIMM_SETS, choose_state
from teachers.messages import say_once, took


def read_timm_file(path: Path, where: str) -> dict[str, Tensor]:
    """The state dict of a file; of several sets of weights the one that timm takes.

    Args:
        path: a safetensors or torch file.
        where: the key in the recipe, for messages.

    Raises:
        StudentError: it cannot be read, or holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise StudentError(
            f"{where}: {path} holds more than tensors, or is damaged; it is not unpickled. Save "
            "only the state dict, preferably as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise StudentError(f"{where}: {path} cannot be read: {error}") from None
    state = clean_state_dict(dict(choose_state(content, str(path), TIMM_SETS)))
    found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not found:
        raise StudentError(f"{where}: {path} holds no weights")
    return found


def say_default_tag(model: str, where: str) -> None:
    """Says which published weights a name without a tag stands for."""
    published = timm.get_pretrained_cfg(model)
    if "." not in model and published is not None and published.tag:
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]
        took(where, f"the tag {published.tag}", tags, "timm's default")


def timm_pixels(
    init: TimmInit,
    cfg: Mapping[str, Any],
    where: str,
    *,
    assumes: bool,
    key: str = "student.init.model",
) -> tuple[Colour, Colour]:
    """The pixel mean and std of the initial weights.

    Those of a timm `config.json` beside the file, else of the tag in the model's name; of a name
    without a tag, timm's default tag, which is said if the student takes them (`assumes`). The key
    of the recipe that names the model is for messages.

    Raises:
        StudentError: the config beside the file is of another architecture, or states no mean.
    """
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if init.weights == "hub":
        return mean, std
    config = init.weights.parent / "config.json"
    try:
        stored = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError as error:
        raise StudentError(f"{where}: {config} is not JSON: {error}") from None
    if isinstance(stored, dict) and "architecture" in stored:
        if stored["architecture"] != init.model.split(".")[0]:
            raise StudentError(
                f"{where}: {config} states the architecture {stored['architecture']!r}; give "
                f"{key} that name, or move the config away"
            )
        stated = stored.get("pretrained_cfg", stored)
        if "mean" in stated and "std" in stated:
            return _colour(stated["mean"], config), _colour(stated["std"], config)
    if assumes and "." not in init.model:
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        say_once(
            f"{where}: mean {list(mean)} and std {list(std)} assumed, that of timm's "
            f"{init.model}{tag}: {init.weights} states none; set student.mean and student.std if "
            "it was trained with others"
        )
    return mean, std


def _colour(value: Any, config: Path) -> Colour:
    if not isinstance(value, list) or len(value) != 3:
        raise StudentError(f"{config}: expected three numbers for mean and std, got {value}")
    return value[0], value[1], value[2]
