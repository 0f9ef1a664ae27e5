"""Writes a run's upsampler as the file that is kept: the step and its fidelity on the card."""

import json
from pathlib import Path
from typing import Any

from distill.runtime.checkpoint import read_manifest
from distill.runtime.errors import RecipeError
from teachers.upsamplers.trained import read_upsampler, save_upsampler

NAME = "upsampler.safetensors"  # in a checkpoint
_MEASURED = ("own", "box", "true", "seam_ratio", "image_source", "view_seed")


def export_upsampler(checkpoint: Path, out: Path, *, half: bool, force: bool) -> None:
    """Writes a checkpoint's upsampler as one safetensors file; whole or not at all.

    The card gains the step, the images seen, and, where `distill.evaluate` has measured this very
    checkpoint, its fidelity. It loses where the run and its shards lay on the machine.

    Args:
        checkpoint: the folder of a whole checkpoint.
        out: the file to write; missing folders above it are made.
        half: whether its weights are stored in float16.
        force: whether `out` may be overwritten.

    Raises:
        RecipeError: `out` is there or cannot be written.
    """
    check_out(out, force)
    card, tensors = read_upsampler(checkpoint / NAME)
    step = read_manifest(checkpoint)["step"]
    images = step * card.facts["recipe"]["run"]["batch_size"]
    facts = {**card.facts, "steps": step, "images_seen": images}
    facts |= {"recipe": _without_places(card.facts["recipe"]), "fidelity": _measured(checkpoint)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_upsampler(out, tensors, card.model_copy(update={"facts": facts}), half=half)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written ({error.strerror or error})") from None


def check_out(out: Path, force: bool) -> None:
    """Refuses a file that is there, unless forced, and a folder.

    Raises:
        RecipeError: with what to do.
    """
    if out.is_dir():
        raise RecipeError(f"{out} is a folder; name the file to write, {out / 'NAME.safetensors'}")
    if out.exists() and not force:
        raise RecipeError(f"{out} is already there; --force overwrites it")


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe, with the names of shards in place of their paths."""
    run = {key: value for key, value in recipe["run"].items() if key != "dir"}
    sources = [
        source | {"shards": [shards.rstrip("/").rpartition("/")[2] for shards in source["shards"]]}
        for source in recipe["data"]["sources"]
    ]
    return recipe | {"run": run, "data": recipe["data"] | {"sources": sources}}


def _measured(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint.parent.parent / "evaluation" / "fidelity.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # By name: the file's path was written relative to where `distill.evaluate` ran.
    own = [row for row in rows if Path(row["file"]).parent.name == checkpoint.name]
    return {key: own[-1][key] for key in _MEASURED} if own else None
