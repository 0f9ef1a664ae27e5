"""Reads the student to export, and selects its heads and the space of their maps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.files import read_json_lines
from distill.runtime.checkpoint import find_checkpoint, read_manifest
from distill.runtime.config import load_yaml
from distill.runtime.errors import RecipeError
from distill.targets.target_statistics import IN_CHECKPOINT
from student.hf_folder import HEADS
from student.hub import on_hub
from student.shipped import is_name, shipped
from student.storage import FORMAT, StudentFile, read_student, student_file
from teachers.files import format_of
from teachers.messages import did_you_mean, took
from teachers.phi_s import PhiS, load_phi_s


class Source(NamedTuple):
    """A student to export.

    Attributes:
        file: its weights and config; the metadata has the recipe, the step and the versions.
        checkpoint: the folder that has the statistics of its teachers; None for a student's file.
    """

    file: StudentFile
    checkpoint: Path | None


def read_source(path: Path) -> Source:
    """Reads a student.

    Args:
        path: the folder of a run or of a checkpoint, a file of `save_student`, a folder of
            `--format hf`, `hf://OWNER/NAME` on the hub, the name of a student that ships, or a
            model of the RADIO family in its public format.

    Raises:
        RecipeError: a folder without a whole checkpoint, or a RADIO model that is not built like
            a student.
        StudentError: there is nothing at the path, or a student's file that is damaged.
        TeacherError: a file in neither format.
    """
    if on_hub(path) or shipped(path) or is_name(path):
        path = student_file(path)
    if (path / HEADS).is_file():
        return Source(read_student(path), None)
    radio = (path / "config.json").is_file()
    if radio and (path / "checkpoints").is_dir():
        took(f"{path}", "its config.json", ["its config.json", "its checkpoints"], "a RADIO model")
    if path.is_dir() and not radio:
        checkpoint = find_checkpoint(path)
        file = read_student(checkpoint / "student.safetensors")
        manifest = read_manifest(checkpoint)
        metadata = {
            **file.metadata,
            "recipe": (checkpoint / "recipe.yaml").read_text(encoding="utf-8"),
            "versions": json.dumps(manifest["versions"]),
            "step": str(manifest["step"]),
            "head_space": "training" if is_standardised(checkpoint) else "teacher",
        }
        return Source(file._replace(metadata=metadata), checkpoint)
    # Of RADIO's files in this format the config lies beside them.
    alone = path.suffix == ".safetensors" and not (path.parent / "config.json").is_file()
    if _is_student(path) or (alone and path.is_file()):
        return Source(read_student(path), None)
    from distill.formats.radio_reader import read_radio_student  # builds timm's models

    return Source(read_radio_student(path), None)


def trained_sizes(metadata: Mapping[str, str], recipe: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of the images that a student was trained on, smallest area first.

    Args:
        metadata: of its file, which has the largest size.
        recipe: of its run, which tells where the file, an older one, does not, and has all sizes;
            empty where it is not known.

    Returns:
        An empty list if neither tells.
    """
    found: set[tuple[int, int]] = set()
    if "resolution" in metadata:
        height, width = json.loads(metadata["resolution"])
        found.add((height, width))
    for place in (recipe.get("run", {}), *(recipe.get("arms") or {}).values()):
        value = place.get("resolution")
        listed = isinstance(value, list) and isinstance(value[0], Mapping)
        for size in [each["size"] for each in value] if listed else [value]:
            if size is not None:
                found.add(tuple(size) if isinstance(size, list) else (size, size))
    return sorted(found, key=lambda size: (size[0] * size[1], size))


def measured_fidelity(checkpoint: Path) -> list[dict[str, Any]]:
    """What `distill.evaluate` measured on the checkpoints of a run, as it wrote it.

    A row names its checkpoint by a path relative to where the command ran, so compare the name of
    the checkpoint's folder only.
    """
    return read_json_lines(checkpoint.parent.parent / "evaluation" / "fidelity.jsonl")


def _is_student(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return format_of(file.metadata()) == FORMAT
    except (SafetensorError, OSError):
        return False


def keep_heads(file: StudentFile, names: tuple[str, ...]) -> StudentFile:
    """The student with only the heads of some teachers.

    All class tokens stay, so the backbone and the kept heads return the same numbers, bit for bit.

    Raises:
        RecipeError: no such head.
    """
    known = [name for name in file.targets if file.config.head.has(name)]
    for name in names:
        if name not in known:
            have = f"there are {', '.join(known)}" if known else "this file has none"
            raise RecipeError(f"--head: no head {name!r}{did_you_mean(name, known)}; {have}")
    head = file.config.head.model_copy(update={"only": names})
    state = {
        key: value
        for key, value in file.state_dict.items()
        if not key.startswith("heads.") or key.split(".")[1] in names
    }
    config = file.config.model_copy(update={"head": head})
    return file._replace(config=config, state_dict=state)


def to_teacher_space(source: Source) -> StudentFile:
    """The student with PHI-S folded into its heads, so that they return the teachers' own spaces.

    Raises:
        RecipeError: there are no statistics to fold.
    """
    file, checkpoint = source
    if file.metadata.get("head_space") == "teacher":
        return file
    names = [name for name in file.targets if file.config.head.has(name)]
    state = file.state_dict
    for name in names:
        if checkpoint is None:
            raise RecipeError(
                f"the heads of this file return standardised maps, and the statistics of {name!r} "
                "are in the checkpoints of its run; export one of these"
            )
        path = checkpoint / "statistics" / f"{name}.safetensors"
        if not path.is_file():
            raise RecipeError(
                f"{checkpoint} has no statistics of {name!r}, whose losses have weight zero: its "
                "head was not trained. Choose another with --head, or none with --no-heads"
            )
        state = _fold(state, name, load_phi_s(path, IN_CHECKPOINT))
    return file._replace(state_dict=state, metadata=file.metadata | {"head_space": "teacher"})


def is_standardised(checkpoint: Path) -> bool:
    """Whether the heads of a run were trained towards standardised maps."""
    recipe = load_yaml(checkpoint / "recipe.yaml")
    return bool(recipe["objective"]["standardisation"] != "none")


def _fold(state: Mapping[str, Tensor], name: str, phi_s: PhiS) -> dict[str, Tensor]:
    """The weights with the inverse of PHI-S folded into the last layer of a spatial head."""
    last = f"heads.{name}.spatial.final.2"
    weight, bias = state[f"{last}.weight"], state[f"{last}.bias"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    folded = phi_s.fold_into_linear(linear)
    new: dict[str, Tensor] = {f"{last}.weight": folded.weight, f"{last}.bias": folded.bias}
    return {**state, **{key: torch.as_tensor(value).detach() for key, value in new.items()}}
