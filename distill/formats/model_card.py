"""The model card of an exported student: what a stranger must know before using it.

Markdown with the front matter of the Hugging Face hub, where it goes as README.md. Recipe, teachers
and their licences (the `licences` of the student's metadata), resolutions and results are the run's
own; no place of the machine that trained it is named.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from distill.runtime.config import dump_yaml, parse_yaml
from student.storage import StudentFile

_HEADER = """---
library_name: featsharp-distill
pipeline_tag: image-feature-extraction
license: other
tags: [vision, feature-extraction, distillation, agglomerative]
---
"""
_UNKNOWN_LICENCE = "not known here: that of its weights' source"
_LOAD = {
    "safetensors": "import student\nmodel = student.load({name!r})",
    "onnx": "import onnxruntime\nmodel = onnxruntime.InferenceSession({name!r})",
    "radio": "import torch\nmodel = torch.hub.load('NVlabs/RADIO', 'radio_model', version={name!r},"
    "\n                       adaptor_names={heads})",
}


def model_card(file: StudentFile, out: Path, format: str, checkpoint: Path | None) -> str:
    """The text.

    Args:
        file: the student as it is exported.
        out: its file.
        format: of that file.
        checkpoint: where it was trained; None where it came from a file, whose recipe is told but
            no results.
    """
    recipe = parse_yaml(file.metadata["recipe"], "recipe") if "recipe" in file.metadata else {}
    heads = [name for name in file.targets if file.config.head.has(name)]
    load = _LOAD[format].format(name=out.name, heads=heads)
    parts = [
        f"# {out.name}",
        _summary(file),
        f"```python\n{load}\n```",
        *_section("Teachers", _teachers(file, recipe.get("teachers", {}))),
        *_section("Resolutions", _resolutions(file, recipe)),
        *_section("Outputs", _outputs(file, heads)),
        *_section("Results", _results(checkpoint)),
        *_section("Recipe", f"```yaml\n{dump_yaml(_without_places(recipe))}```" if recipe else ""),
        *_section("Versions", _versions(file)),
    ]
    return _HEADER + "\n" + "\n\n".join(parts) + "\n"


def _section(title: str, text: str) -> Sequence[str]:
    return (f"## {title}", text) if text else ()


def _summary(file: StudentFile) -> str:
    width, depth, heads, _ = file.config.shape
    total = sum(value.numel() for value in file.state_dict.values())
    trunk = sum(v.numel() for k, v in file.state_dict.items() if k.startswith("trunk."))
    step = f" after {file.metadata['step']} steps" if "step" in file.metadata else ""
    return (
        f"A ViT of {depth} blocks, {width} channels and {heads} heads with patches of "
        f"{file.config.patch_size} px, distilled{step} from {', '.join(file.targets)}. "
        f"{total / 1e6:.1f} million parameters, {trunk / 1e6:.1f} of them in the backbone."
    )


def _teachers(file: StudentFile, teachers: Mapping[str, Mapping[str, Any]]) -> str:
    if not teachers:
        return ""
    licences = json.loads(file.metadata.get("licences", "{}"))
    rows = [
        (
            name,
            entry.get("kind"),
            _without_places(entry.get("model")),
            _without_places(entry.get("weights")),
            _upsampler(entry.get("upsampler")),
            licences.get(name, _UNKNOWN_LICENCE),
        )
        for name, entry in teachers.items()
    ]
    table = _table(("teacher", "kind", "model", "weights", "upsampler", "licence"), rows)
    return (
        f"{table}\n\nA licence of a teacher's weights may limit what the student may be used for."
    )


def _upsampler(entry: Any) -> str | None:
    entries = entry if isinstance(entry, list) else [entry] if entry else []
    names = [each.get("path") or each.get("kind") for each in entries]
    return ", ".join(str(_without_places(name)) for name in names) or None


def _resolutions(file: StudentFile, recipe: Mapping[str, Any]) -> str:
    trained = recipe.get("run", {}).get("resolution")
    at = f"Trained at {trained[0]} x {trained[1]} px. " if trained else ""
    side = file.config.max_resolution
    return (
        f"{at}Takes images in [0, 1] of any height and width in multiples of "
        f"{file.config.patch_size} px; its positions were learned up to {side} x {side} px. It "
        f"normalises pixels itself, by mean {file.config.mean} and std {file.config.std}."
    )


def _outputs(file: StudentFile, heads: Sequence[str]) -> str:
    width = file.config.shape.width
    with_summary = sum(target.summary_dim is not None for target in file.targets.values())
    rows: list[tuple[Any, ...]] = [("backbone", with_summary * width or None, width, 1, "its own")]
    space = "its teacher's" if file.metadata.get("head_space") == "teacher" else "that of training"
    for name in heads:
        target, upsample = file.targets[name], file.config.head.upsample.get(name, 1)
        rows.append((name, target.summary_dim, target.spatial_dim, upsample, space))
    return _table(("output", "summary", "map", "cells a patch and side", "space of the map"), rows)


def _results(checkpoint: Path | None) -> str:
    """The agreement that `distill.evaluate` measured on this very checkpoint."""
    path = checkpoint.parent.parent / "evaluation" / "fidelity.jsonl" if checkpoint else None
    if checkpoint is None or path is None or not path.is_file():
        return ""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    own = [
        (
            row["teacher"],
            "{} x {}".format(*row["resolution"]),
            *(_figure(row[key]) for key in ("fidelity", "spatial_cosine", "summary_cosine")),
        )
        for row in rows
        # By name: the path was written relative to where `distill.evaluate` ran.
        if row["student"] == "trained" and PurePath(row["checkpoint"]).name == checkpoint.name
    ]
    columns = ("teacher", "resolution", "fidelity", "spatial cosine", "summary cosine")
    told = (
        "Agreement with the teachers on held-out images; fidelity 1 is that of the best constant."
    )
    return f"{told}\n\n{_table(columns, own)}" if own else ""


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _versions(file: StudentFile) -> str:
    versions = json.loads(file.metadata.get("versions", "{}"))
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


def _without_places(value: Any) -> Any:
    """Absolute paths shortened to their names, wherever they stand."""
    if isinstance(value, Mapping):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value
