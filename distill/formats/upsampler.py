"""Reads the upsampler of a run's checkpoint for export, with its step and fidelity on the card."""

from pathlib import Path
from typing import Any

from torch import Tensor

from distill.formats.source import measured_fidelity
from distill.runtime.checkpoint import read_manifest
from teachers.upsamplers.trained import UpsamplerCard, read_upsampler

NAME = "upsampler.safetensors"  # in a checkpoint
_MEASURED = ("own", "box", "true", "seam_ratio", "image_source", "view_seed")


def has_upsampler(path: Path) -> bool:
    """Whether a path is the folder of an upsampler's run, or of one of its checkpoints."""
    return path.is_dir() and any(
        (folder / NAME).is_file() for folder in (path, *path.glob("checkpoints/step-*"))
    )


def read_trained_upsampler(checkpoint: Path) -> tuple[UpsamplerCard, dict[str, Tensor]]:
    """The card and the tensors of a checkpoint's upsampler.

    The card gains the step, the number of images seen and, if `distill.evaluate` has measured this
    checkpoint, the fidelity. It loses the paths of the run and of its shards.
    """
    card, tensors = read_upsampler(checkpoint / NAME)
    step = read_manifest(checkpoint)["step"]
    facts = card.facts | {
        "steps": step,
        "images_seen": step * card.facts["recipe"]["run"]["batch_size"],
        "recipe": _relocatable(card.facts["recipe"]),
        "fidelity": _measured(checkpoint),
    }
    return card.model_copy(update={"facts": facts}), tensors


def _relocatable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the folder of the run, and with the names of shards for their paths."""
    run = {key: value for key, value in recipe["run"].items() if key != "dir"}
    sources = [
        source | {"shards": [shards.rstrip("/").rpartition("/")[2] for shards in source["shards"]]}
        for source in recipe["data"]["sources"]
    ]
    return recipe | {"run": run, "data": recipe["data"] | {"sources": sources}}


def _measured(checkpoint: Path) -> dict[str, Any] | None:
    own = [
        row
        for row in measured_fidelity(checkpoint)
        if Path(row["file"]).parent.name == checkpoint.name
    ]
    return {key: own[-1][key] for key in _MEASURED} if own else None
