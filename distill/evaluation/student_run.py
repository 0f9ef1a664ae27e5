"""Measures the agreement of a student with its teachers, before and after training."""

from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable

from data.batch import scale_pixels
from data.files import write_json_lines
from data.images import load_images
from distill.benchmarks.fidelity import Agreement, EvaluationConfig, measure, require_images
from distill.display.pictures import Captions, draw_panels
from distill.display.text import table_text
from distill.evaluation.student_page import shown_student, write_page
from distill.runtime import distributed
from distill.runtime.errors import RecipeError
from distill.targets.source import LiveTargets
from distill.tasks.trained import Trained, load_trained
from student.model import Student
from student.timm_config import started_from

_SHOWN = 4  # images of a picture


def evaluate_student(trained: Trained) -> tuple[list[dict[str, Any]], Path]:
    """Writes metrics, pictures of feature maps and the page of a run.

    Returns:
        The rows of `fidelity.jsonl`, and the path of the page.

    Raises:
        RecipeError: the recipe has no section `evaluation`, or its images do not exist.
        DataError: the images cannot be read.
    """
    config = trained.recipe.evaluation
    if config is None:
        raise RecipeError(
            "evaluation: the recipe has no such section; add "
            "evaluation.images=FOLDER evaluation.resolutions=[256] to the command"
        )
    require_images(config.images)
    students, targets = load_trained(trained)
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Path] = {}
    folder = trained.run / "evaluation"
    for resolution in config.resolutions:
        images, names = load_images(config.images, resolution)
        measured = measure(students, targets, images, config.batch_size)
        for teacher, by_student in measured.items():
            for student, agreement in by_student.items():
                facts = {"teacher": teacher, "resolution": list(resolution), "student": student}
                rows.append(facts | _protocol(trained, config, names) | agreement._asdict())
        size = f"{resolution[0]} x {resolution[1]} px"
        pictures[size] = folder / f"panels_{resolution[0]}x{resolution[1]}.png"
        titles = {"trained": "student", "untrained": shown_student(rows[0])}
        shown = {title: students[name] for name, title in titles.items()}
        captions = {
            teacher: {title: _lines(each[name]) for name, title in titles.items()}
            for teacher, each in measured.items()
        }
        _draw(pictures[size], images[:_SHOWN], shown, targets, captions)
    write_json_lines(folder / "fidelity.jsonl", rows)
    return rows, write_page(trained, rows, pictures)


def agreement_table(rows: list[dict[str, Any]]) -> RichTable:
    """The rows of `fidelity.jsonl` as a table for a terminal."""
    table = RichTable("teacher", "resolution", "student", title="Agreement on held-out images")
    for name in ("fidelity", "spatial cosine", "summary cosine"):
        table.add_column(name, justify="right")
    for row in rows:
        height, width = row["resolution"]
        figures = [row["fidelity"], row["spatial_cosine"], row["summary_cosine"]]
        table.add_row(
            table_text(row["teacher"]),
            f"{height} x {width}",
            table_text(shown_student(row)),
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
            end_section=row["student"] == "trained",
        )
    return table


def _protocol(trained: Trained, config: EvaluationConfig, names: list[str]) -> dict[str, Any]:
    """The facts that are needed to measure a row again."""
    started = started_from(trained.recipe.student)
    return ({} if started is None else {"started_from": started}) | {
        "step": trained.step,
        "checkpoint": str(trained.checkpoint),
        "seed": trained.recipe.run.seed,
        "image_source": str(config.images),
        "images": names,
        "standardisation": trained.recipe.objective.standardisation,
        "variance": "over the measured cells",
    }


def _lines(agreement: Agreement) -> list[str]:
    """The figures below a column of a picture."""
    cosine = round(agreement.spatial_cosine, 2) + 0.0  # no minus before a zero
    return [f"fidelity {agreement.fidelity:.2f}", f"cosine {cosine:.2f}"]


@torch.no_grad()
def _draw(
    path: Path,
    images: torch.Tensor,
    students: dict[str, Student],
    targets: LiveTargets,
    captions: Captions,
) -> None:
    pixels = scale_pixels(images, distributed.device())
    outputs = {name: student(pixels) for name, student in students.items()}
    draw_panels(path, pixels, targets(pixels), outputs, captions)
