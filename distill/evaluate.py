"""Measures a trained student: `python -m distill.evaluate RECIPE|RUN|CHECKPOINT [key=value ...]`.

Writes `evaluation/fidelity.jsonl` and pictures into the run's folder, and a page to look at,
`page/index.html`. Exit codes: 0 done, 2 a user's mistake.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data.images import load_images
from distill import distributed
from distill.errors import RecipeError, command
from distill.evaluation.fidelity import EvaluationConfig, measure
from distill.evaluation.page import write_page
from distill.files import write_text
from distill.pictures import draw_panels
from distill.targets import Targets
from distill.trained import Trained, find_trained, load_trained
from student.model import Student

SHOWN = 4  # images of a picture


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distill.evaluate",
        description="Measure how well a student agrees with its teachers on held-out images, "
        "before and after training, and write a page that shows it.",
    )
    parser.add_argument(
        "target",
        type=Path,
        metavar="TARGET",
        help="a student recipe, the folder of a run, or one of its checkpoints",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes to the recipe, such as evaluation.resolutions=[256,[384,512]]",
    )
    return parser.parse_args(arguments)


@command
def main() -> None:
    """The command."""
    arguments = parse_arguments()
    trained = find_trained(arguments.target, arguments.overrides)
    rows, page = evaluate(trained)
    Console().print(_table(rows))
    print(f"page: {page}")


def evaluate(trained: Trained) -> tuple[list[dict[str, Any]], Path]:
    """Measures, draws and writes everything.

    Returns:
        The lines of `fidelity.jsonl`, and the path of the page.

    Raises:
        RecipeError: the recipe has no section `evaluation`, or its images are not there.
        DataError: the images cannot be read.
    """
    config = trained.recipe.evaluation
    if config is None:
        raise RecipeError(
            "evaluation: the recipe has no such section; add "
            "evaluation.images=FOLDER evaluation.resolutions=[256] to the command"
        )
    if not config.images.exists():  # said before teachers are built, which may take minutes
        raise RecipeError(
            f"evaluation.images: there is no {config.images.absolute()}; set it to a folder, "
            "archive or shards of images that the run does not train on"
        )
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
        _draw(pictures[size], images[:SHOWN], students, targets)
    write_text(
        folder / "fidelity.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    )
    return rows, write_page(trained, rows, pictures)


def _protocol(trained: Trained, config: EvaluationConfig, names: list[str]) -> dict[str, Any]:
    """What a figure needs beside it to be measured again."""
    return {
        "step": trained.step,
        "checkpoint": str(trained.checkpoint),
        "seed": trained.recipe.run.seed,
        "image_source": str(config.images),
        "images": names,
        "standardisation": trained.recipe.objective.standardisation,
        "variance": "over the measured cells",
    }


@torch.no_grad()
def _draw(path: Path, images: torch.Tensor, students: dict[str, Student], targets: Targets) -> None:
    pixels = images.to(distributed.device()).float() / 255
    outputs = {name: student(pixels) for name, student in students.items()}
    draw_panels(path, pixels, targets(pixels), outputs)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("teacher", "resolution", "student", title="Agreement on held-out images")
    for name in ("fidelity", "spatial cosine", "summary cosine"):
        table.add_column(name, justify="right")
    for row in rows:
        height, width = row["resolution"]
        figures = [row["fidelity"], row["spatial_cosine"], row["summary_cosine"]]
        table.add_row(
            row["teacher"],
            f"{height} x {width}",
            row["student"],
            *("-" if figure is None else f"{figure:.3f}" for figure in figures),
            end_section=row["student"] == "trained",
        )
    return table


if __name__ == "__main__":
    main()
