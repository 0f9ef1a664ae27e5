"""Writes the model card of an exported student, Markdown with the metadata of Hugging Face's hub.

The card goes there as README.md. It has the recipe, the teachers with the licences of their
weights, the resolutions and the results of the run, and no absolute path of the machine that
trained it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from distill.display.pages import render
from distill.formats.hf_config import best_size, hf_config, vllm_serves
from distill.formats.hub_metadata import hub_metadata
from distill.formats.onnx_agreement import Agreement
from distill.formats.scores import benchmark_scores
from distill.formats.source import measured_fidelity, trained_sizes
from distill.runtime.config import dump_yaml, parse_yaml
from student.storage import StudentFile
from student.timm_config import AnyStudentConfig, TimmStudentConfig
from teachers.licences import is_apache

# A path from the root or a home, but not the rest of a URL; as in "local-dir:/models/clip".
_ABSOLUTE = re.compile(r"(?:(?<=file://)|(?<![^\s:='\"(,\[]))~?/(?!/)[^\s'\"),;\]]+")
_FIGURES = ("fidelity", "spatial_cosine", "summary_cosine")
_UNKNOWN_LICENCE = "unknown; see the source of its weights"


def model_card(
    file: StudentFile,
    out: Path,
    format: str,
    checkpoint: Path | None,
    agreement: Agreement | None = None,
) -> str:
    """The text of the card of a student that is exported to `out` in a format of `export.FORMATS`.

    Without the checkpoint where it was trained, the card has the recipe but no results. The
    agreement is that of an ONNX file with PyTorch.
    """
    recipe = parse_yaml(file.metadata["recipe"], "recipe") if "recipe" in file.metadata else {}
    heads = [name for name in file.targets if file.config.head.has(name)]
    counts = {name: value.numel() for name, value in file.state_dict.items()}
    versions = json.loads(file.metadata.get("versions", "{}"))
    measured = _measured(checkpoint) if checkpoint else []
    metadata = hub_metadata(out.name, format, licence_of(file), relocatable(recipe), measured)
    return render(
        "model_card.md.jinja",
        name=out.name,
        format=format,
        config=file.config,
        trunk=_trunk(file.config),
        targets=list(file.targets),
        heads=heads,
        metadata=dump_yaml(metadata),
        vllm=format == "hf" and vllm_serves(hf_config(file, best_size(file))),
        step=file.metadata.get("step"),
        parameters=sum(counts.values()),
        trunk_parameters=sum(n for name, n in counts.items() if name.startswith("trunk.")),
        teachers=_teachers(file, recipe.get("teachers", {})),
        sizes=trained_sizes(file.metadata, recipe),
        outputs=_outputs(file, heads),
        results=[_result(row) for row in measured],
        scores=benchmark_scores(checkpoint, out) if checkpoint else [],
        agreement=agreement,
        recipe=dump_yaml(relocatable(recipe)) if recipe else "",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )


def _trunk(config: AnyStudentConfig) -> str:
    """The architecture in words."""
    if isinstance(config, TimmStudentConfig):
        where = f"level {config.level_index} of {config.network.describe_levels()}"
        return f"timm's `{config.model}`, whose map is that of {where},"
    shape = config.shape
    return (
        f"A ViT of {shape.depth} blocks, {shape.width} channels and {shape.heads} heads with "
        f"patches of {config.patch_size} px,"
    )


def _teachers(file: StudentFile, teachers: Mapping[str, Mapping[str, Any]]) -> list[Sequence[Any]]:
    licences = json.loads(file.metadata.get("licences", "{}"))
    return [
        (
            name,
            entry.get("kind"),
            relocatable(entry.get("model")),
            relocatable(entry.get("weights")),
            _upsampler(entry.get("upsampler")),
            relocatable(licences.get(name, _UNKNOWN_LICENCE)),
        )
        for name, entry in teachers.items()
    ]


def _upsampler(entry: Any) -> str | None:
    entries = entry if isinstance(entry, list) else [entry] if entry else []
    names = [each.get("path") or each.get("kind") for each in entries]
    return ", ".join(str(relocatable(name)) for name in names) or None


def _outputs(file: StudentFile, heads: Sequence[str]) -> list[Sequence[Any]]:
    config = file.config
    summary = sum(target.summary_dim is not None for target in file.targets.values())
    if isinstance(config, TimmStudentConfig):
        width = config.network.levels[config.level_index].channels
        summary = config.network.summary_dim if summary else 0
    else:
        width = config.shape.width
        summary *= width
    rows: list[Sequence[Any]] = [("backbone", summary or None, width, 1, "its own")]
    space = "its teacher's" if file.metadata.get("head_space") == "teacher" else "standardised"
    for name in heads:
        target, upsample = file.targets[name], file.config.head.upsample.get(name, 1)
        rows.append((name, target.summary_dim, target.spatial_dim, upsample, space))
    return rows


def _measured(checkpoint: Path) -> list[dict[str, Any]]:
    """The agreement with the teachers that `distill.evaluate` measured on this checkpoint."""
    return [
        {key: row[key] for key in ("teacher", "resolution", *_FIGURES)}
        for row in measured_fidelity(checkpoint)
        if row["student"] == "trained" and PurePath(row["checkpoint"]).name == checkpoint.name
    ]


def _result(row: Mapping[str, Any]) -> list[str | None]:
    figures = (None if row[key] is None else f"{row[key]:.3f}" for key in _FIGURES)
    return [row["teacher"], "{} x {}".format(*row["resolution"]), *figures]


def licence_of(file: StudentFile) -> str:
    """The hub's identifier: that of this code where no teacher's weights have another licence."""
    licences = json.loads(file.metadata.get("licences", "{}"))
    known = all(name in licences for name in file.targets)
    return "apache-2.0" if known and all(map(is_apache, licences.values())) else "other"


def relocatable(value: Any) -> Any:
    """A part of a recipe with absolute paths, also within texts, cut to their last component."""
    if isinstance(value, Mapping):
        return {relocatable(key): relocatable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [relocatable(each) for each in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")):
        return PurePath(value).name
    return _ABSOLUTE.sub(lambda found: PurePath(found[0]).name, value)
