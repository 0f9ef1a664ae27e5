"""Compares upsamplers of one teacher: `task: upsamplers`, and `task: upsampler` for a single run.

All methods are measured on the same images and views. A method has one file for each seed that it
was trained with. Methods of different factors are not compared with each other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from rich.table import Table as RichTable

from data.batch import scale_pixels
from data.files import write_json_lines
from data.images import load_images
from distill.benchmarks.fidelity import require_images
from distill.benchmarks.upsampling import (
    UpsamplerEvaluationConfig,
    UpsamplerPair,
    held_out_views,
    measure_upsamplers,
    upsampled_maps,
)
from distill.display.pictures import draw_maps
from distill.display.text import table_text
from distill.runtime import distributed
from distill.runtime.checkpoint import MANIFEST, find_checkpoint, read_manifest
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import AnyTeacher
from distill.tasks.trained import find_run, recipe_file
from distill.tasks.upsampler_recipe import load_upsampler_recipe
from teachers.build import build_teacher
from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.fingerprint import teacher_fingerprint
from teachers.teacher import Teacher, TeacherConfig
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.resize import scaled
from teachers.upsamplers.trained import TrainedUpsampler, UpsamplerCard, load_downsampler

_SHOWN = 4  # images of a picture
_FIDELITIES = ("own", "box", "true")


class ComparisonRecipe(StrictConfig):
    """Upsamplers of one teacher to compare.

    Attributes:
        dir: the folder for `fidelity.jsonl` and pictures.
        teacher: the encoder of all upsamplers, without an upsampler.
        methods: name to one trained upsampler for each seed: the folder of a run (its newest
            checkpoint) or of a checkpoint, a file, or the name of a shipped upsampler.
        evaluation: the images and views.
    """

    task: Literal["upsamplers"]
    dir: Path
    teacher: AnyTeacher
    methods: Annotated[dict[str, Annotated[list[Path], Field(min_length=1)]], Field(min_length=1)]
    evaluation: UpsamplerEvaluationConfig

    @model_validator(mode="after")
    def _bare_teacher(self) -> Self:
        if self.teacher.upsampler is not None:
            raise ValueError(
                "teacher.upsampler: `methods` has the upsamplers to compare; remove it"
            )
        return self


def compare(
    teacher_config: TeacherConfig,
    methods: Mapping[str, Sequence[Path]],
    config: UpsamplerEvaluationConfig,
    folder: Path,
) -> list[dict[str, Any]]:
    """Writes metrics and pictures of upsampled maps.

    Args:
        teacher_config: the encoder of all upsamplers; everything runs in float32.
        methods: see `ComparisonRecipe`.
        config: the images and views.
        folder: for `fidelity.jsonl` and a picture for each factor, such as `panels_4x4.png`.

    Returns:
        The rows of `fidelity.jsonl`, one for each file, with all facts that are needed to measure
        them again.

    Raises:
        RecipeError: the images or the checkpoint of a run do not exist, or the files of a method
            differ in their factor.
        TeacherError: a file does not exist, or belongs to another encoder.
        DataError: the images cannot be read.
    """
    require_images(config.images)
    files = {name: [_file(path, name) for path in paths] for name, paths in methods.items()}
    teacher = build_teacher(teacher_config, device=distributed.device())
    fingerprint = teacher_fingerprint(teacher)
    shared = {"teacher": teacher_config.model_dump(mode="json"), "fingerprint": fingerprint}
    by_factor: dict[tuple[int, int], dict[str, list[Path]]] = {}
    for name, paths in files.items():
        by_factor.setdefault(_factor(name, paths, teacher, fingerprint), {})[name] = paths
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for factor, group in by_factor.items():
        picture = folder / f"panels_{factor[0]}x{factor[1]}.png"
        rows += [shared | row for row in _measure(factor, group, teacher, config, picture)]
    write_json_lines(folder / "fidelity.jsonl", rows)
    return rows


def evaluate_upsampler(target: Path, overrides: list[str]) -> tuple[list[dict[str, Any]], Path]:
    """Measures the upsampler of a run, `task: upsampler`.

    Args:
        target: a recipe of `train_upsampler`, the folder of a run (its newest whole checkpoint),
            or one of its checkpoints.
        overrides: `section.key=value` changes to the recipe.

    Returns:
        The rows of `fidelity.jsonl`, and its folder, `evaluation` in the folder of the run.

    Raises:
        RecipeError: the recipe has no section `evaluation`, its images do not exist, or the run
            has no whole checkpoint.
    """
    recipe = load_upsampler_recipe(recipe_file(target), overrides)
    if recipe.evaluation is None:
        raise RecipeError(
            "evaluation: the recipe has no such section; add evaluation.images=FOLDER to the "
            "command"
        )
    run, checkpoint = find_run(target, recipe.run.dir)
    folder = run / "evaluation"
    methods = {recipe.upsampler.kind: [checkpoint]}
    return compare(recipe.teacher, methods, recipe.evaluation, folder), folder


def _measure(
    factor: tuple[int, int],
    files: Mapping[str, Sequence[Path]],
    teacher: Teacher,
    config: UpsamplerEvaluationConfig,
    picture: Path,
) -> list[dict[str, Any]]:
    """Measures the methods of one factor, and draws maps of the first file of each."""
    images, names = load_images(config.images, scaled(teacher.spec.resolution, factor))
    views = held_out_views(config, len(images), teacher.spec)
    paths = {f"{name} {i}": (name, path) for name, ps in files.items() for i, path in enumerate(ps)}
    device = teacher.mean.device
    opened = {key: _open(path, teacher).to(device) for key, (_, path) in paths.items()}
    candidates = {
        key: UpsamplerPair(opened[key], load_downsampler(path).to(device))
        for key, (_, path) in paths.items()
    }
    metrics = measure_upsamplers(candidates, teacher, images, views, config.batch_size)
    apart = max(1, len(images) // _SHOWN)  # neighbours are often frames of one film
    shown = scale_pixels(images[::apart][:_SHOWN], device)
    first = {name: opened[f"{name} 0"] for name in files}
    draw_maps(picture, shown, upsampled_maps(first, teacher, shown))
    measured_on = {
        "image_source": str(config.images),
        "images": names,
        "views": config.views.model_dump(mode="json"),
        "view_seed": config.seed,
    }
    return [
        {"method": name, "factor": list(factor), **metrics[key]._asdict()}
        | {"file": str(path), "training": _training(path, opened[key].card)}
        | measured_on
        for key, (name, path) in paths.items()
    ]


def _file(path: Path, method: str) -> Path:
    """The file of an entry of a method."""
    if not path.is_dir():
        return path
    file = find_checkpoint(path) / "upsampler.safetensors"
    if not file.is_file():
        raise RecipeError(f"methods.{method}: {path} is a run without an upsampler")
    return file


def _open(path: Path, teacher: Teacher) -> TrainedUpsampler:
    config = parse_upsampler(path)
    assert config is not None
    upsampler = build_upsampler(config, teacher.spec)
    assert isinstance(upsampler, TrainedUpsampler)
    return upsampler


def _factor(
    method: str, paths: Sequence[Path], teacher: Teacher, fingerprint: str
) -> tuple[int, int]:
    """The factor of a method's files; raises if they differ or belong to another encoder."""
    factors = []
    for path in paths:
        try:
            upsampler = _open(path, teacher)
            upsampler.check_encoder(fingerprint)
        except TeacherError as error:
            raise TeacherError(f"methods.{method}: {error}") from error
        factors.append(upsampler.factor)
    if len(set(factors)) > 1:
        found = ", ".join(f"{fh} x {fw}" for fh, fw in sorted(set(factors)))
        raise RecipeError(
            f"methods.{method}: its files have the factors {found}; the files of a method differ "
            "in their seeds only, so list each factor under its own name"
        )
    return factors[0]


def _training(path: Path, card: UpsamplerCard) -> dict[str, Any]:
    """Facts of a file's training from its card and checkpoint; None where they have none."""
    run = card.facts.get("recipe", {}).get("run", {})
    manifest = path.parent / MANIFEST
    step = read_manifest(path.parent)["step"] if manifest.is_file() else card.facts.get("steps")
    batch = run.get("batch_size")
    return {
        "upsampler": card.upsampler,
        "seed": run.get("seed"),
        "steps": step,
        "images_seen": step * batch if step is not None and batch is not None else None,
        "versions": card.facts.get("versions"),
    }


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> RichTable:
    """Rows of `fidelity.jsonl` as a table, a line for each method; the best of a factor is bold."""
    table = RichTable(
        *("factor", "method", "seeds", "images seen"),
        title="Fidelity to the encoder on held-out images (mean ± standard deviation of the seeds)",
    )
    for name in ("own", "box", "true", "seam ratio"):
        table.add_column(name, justify="right")
    groups: dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(tuple(row["factor"]), {}).setdefault(row["method"], []).append(row)
    for factor, methods in groups.items():
        best = {key: max(_means(methods, key), default=None) for key in _FIDELITIES}
        for number, (name, seeds) in enumerate(methods.items(), 1):
            table.add_row(
                f"{factor[0]} x {factor[1]}",
                table_text(name),
                str(len(seeds)),
                _images_seen(seeds),
                *(_cell(seeds, key, best.get(key)) for key in (*_FIDELITIES, "seam_ratio")),
                end_section=number == len(methods),
            )
    return table


def _means(methods: Mapping[str, list[Mapping[str, Any]]], key: str) -> list[float]:
    return [mean(s[key] for s in seeds) for seeds in methods.values() if seeds[0][key] is not None]


def _cell(seeds: list[Mapping[str, Any]], key: str, best: float | None) -> str:
    values = [seed[key] for seed in seeds]
    if None in values:
        return "-"
    average = mean(values)
    text = f"{average:.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    return f"[bold]{text}[/bold]" if average == best else text


def _images_seen(seeds: list[Mapping[str, Any]]) -> str:
    seen = sorted({str(seed["training"]["images_seen"] or "-") for seed in seeds})
    return ", ".join(seen)
