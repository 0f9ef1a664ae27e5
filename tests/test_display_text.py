"""Names of any kind in tables, pages, charts and pictures: shown, not obeyed, and nothing lost."""

import io
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from data.labelled.detection import AnnotatedImage, DetectionSet, Objects
from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.benchmarks.dense.label_pictures import draw_labels
from distill.benchmarks.detection.average_precision import Detections
from distill.benchmarks.detection.detection_pictures import draw_detections
from distill.display.columns import Column, draw_columns
from distill.display.pages import render
from distill.display.tables import Cell, Table
from distill.display.text import chart_text
from distill.evaluation import run
from distill.evaluation.comparison import comparison_table
from distill.evaluation.report_page import write_report
from distill.evaluation.results import Result, results_tables
from distill.evaluation.student_run import agreement_table
from distill.evaluation.suite import SuiteRecipe, read_results, run_suite
from distill.evaluation.throughput_report import draw_throughput, throughput_table
from distill.formats.hub_metadata import hub_metadata
from distill.runtime.command import command
from distill.runtime.config import dump_yaml, validate
from distill.runtime.errors import RecipeError
from distill.tasks.student_recipe import StudentRecipe
from student.storage import read_header, save_student
from teachers.teacher import Teacher
from tests.test_data_text import ENCODINGS, NAMES, Screen, harmless
from tests.tiny_export import build


def printed(table: Any) -> str:
    console = Console(file=io.StringIO(), width=400, force_terminal=False, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def figures(teacher: str, student: str) -> dict[str, Any]:
    cosines = {"fidelity": 1.0, "spatial_cosine": 0.5, "summary_cosine": None}
    return {"teacher": teacher, "resolution": [8, 8], "student": student, **cosines}


def timed(teacher: str, method: str) -> dict[str, Any]:
    seconds = {"seconds_per_image": 1.0, "seconds_per_token": 0.1}
    facts = {"device": "cpu", "precision": "fp32", "batch_size": 1, "rounds": 1}
    sizes = {"factor": [1, 1], "resolution": [8, 8]}
    return {"teacher": teacher, "method": method, **sizes, **seconds, **facts}


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_every_name(name: str) -> None:
    text = NAMES[name]
    row = {"factor": [2, 2], "method": text, "training": {"images_seen": 1}}
    row |= dict.fromkeys(("own", "box", "true", "seam_ratio"), 1.0)
    for table in (
        Table(text, (text, text), [(text, [Cell(text, best=True)])], text).to_rich(),
        agreement_table([figures(text, text)]),
        comparison_table([row]),
        throughput_table([timed(text, text)], [{**timed(text, text), "factor": 2.0}]),
    ):
        shown = printed(table)
        assert harmless(shown.replace("\n", ""))
        if name in ("markup", "formats"):
            assert text in shown


@pytest.mark.filterwarnings("ignore:Glyph")
def test_charts_draw_every_name(tmp_path: Path) -> None:
    """A formula would be set, or fail, after everything was measured."""
    rows = [timed(r"$\frac$", method) for method in ("encoder", *NAMES.values())]
    draw_throughput(tmp_path / "chart.png", rows, [])
    assert (tmp_path / "chart.png").stat().st_size
    for name in NAMES.values():
        assert "$" not in chart_text(name).replace(r"\$", "")
        assert harmless(chart_text(name))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_draw_every_name(tmp_path: Path, name: str) -> None:
    text = NAMES[name]
    pixels = torch.zeros(1, 3, 8, 8)
    draw_columns(tmp_path / "columns.png", [Column(text, pixels, text, [text])])
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    draw_labels(tmp_path / "labels.png", [(pixels[0], labels, labels)], [text])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    box, one, sure = np.array([[1.0, 1, 5, 5]]), np.zeros(1, np.int64), np.ones(1)
    objects = Objects(box, one, sure, np.zeros(1, bool))
    truth = DetectionSet((text,), (AnnotatedImage(tmp_path / "a.png", (8, 8), objects),))
    draw_detections(tmp_path / "boxes.png", truth, [Detections(boxes=box, labels=one, scores=sure)])
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_every_name(tmp_path: Path, name: str) -> None:
    text = NAMES[name]
    facts = {"entry": {"x": text}, "protocol": {text: 1}, "encoder": {"m": text}}
    row = {"benchmark": text, "model": text, "seed": 0, "figures": {text: 1.0}} | facts
    row |= {"lower_is_better": [], "fingerprint": "f"}
    table = Table(text, (text, text), [(text, [Cell(text)])], text)
    page = write_report(tmp_path, [Result(tmp_path, row)], [table], None).read_text("utf-8")
    assert harmless(page.replace("\n", "").replace("\t", ""))
    assert "<script>" not in page
    if name in ("a page", "markup", "emoji", "scripts"):
        assert text in unescape(page)


def test_cards_hold_any_name() -> None:
    """In a table of Markdown neither bars nor line breaks end a cell."""
    card = render("model_card.md.jinja", **_card("a|b\nc\udce9.safetensors"))
    assert r"| a\|b\x0ac\xe9.safetensors |" in card
    assert "# a|b\\x0ac\\xe9.safetensors\n" in card
    index = ModelCard(card.encode().decode()).data.eval_results
    assert index[0].metric_name == "fidelity to a|b\\x0ac\\xe9.safetensors"


def _card(name: str) -> dict[str, Any]:
    student = build()
    values: dict[str, Any] = {"name": name, "format": "safetensors", "config": student.config}
    values |= {"shape": student.config.shape, "targets": [name], "heads": [name], "step": 1}
    values |= {"parameters": 1, "trunk_parameters": 1, "teachers": [[name] * 6], "recipe": ""}
    row = {"teacher": name, "resolution": [32, 64], "fidelity": 0.5}
    metadata = dump_yaml(hub_metadata(name, "hf", "other", {}, [row]))
    values |= {"metadata": metadata, "vllm": False, "trunk": "A ViT"}
    values |= {"sizes": [], "outputs": [], "results": [], "versions": ""}
    values |= {"scores": [], "agreement": None}
    return values


class Named(Benchmark):
    """Its figure and its picture have the names of the trouble."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        Image.new("RGB", (4, 4)).save(folder / "picture.png")
        return Measurement(dict.fromkeys(NAMES.values(), 1.0), {"images": 3})


@pytest.mark.long
@ENCODINGS
def test_a_suite_of_any_names_keeps_and_shows_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Measured, stored, reported on a page, and printed, in any encoding of the screen."""
    screen = Screen(monkeypatch, encoding)
    tree = {
        "task": "benchmarks",
        "dir": str(tmp_path / "results"),
        "models": {name: {"kind": "pixels"} for name in NAMES.values()},
        "benchmarks": {f"{NAMES['markup']}é": {"kind": "tests.test_display_text:Named"}},
        "baseline": "cat",
    }
    recipe = validate(SuiteRecipe, tree, "suite")

    @command
    def main() -> None:
        rows = run_suite(recipe)
        run._show(recipe, [Result(recipe.dir, row) for row in rows])

    main()
    stored = read_results(recipe.dir)
    assert [row["model"] for row in stored] == list(NAMES.values())
    assert set(stored[0]["figures"]) == set(NAMES.values())
    assert (recipe.dir / "index.html").read_text("utf-8").count("base64") >= len(NAMES)
    text = screen.read()
    assert "[red]x[/]" in text
    assert harmless(text.replace("\n", ""))
    assert run_suite(recipe) == stored
    assert results_tables(stored)


def test_the_header_of_a_students_file_holds_any_text(tmp_path: Path) -> None:
    student = build()
    metadata = {"note": "".join(NAMES.values()), **dict.fromkeys(NAMES.values(), "x")}
    save_student(
        tmp_path / "s.safetensors", student.config, student.targets, student.state_dict(), metadata
    )
    assert read_header(tmp_path / "s.safetensors").metadata == metadata


@pytest.mark.parametrize("name", ["long", "a slash", "a line break", "dots", "nothing"])
def test_names_of_teachers_that_can_be_no_files_are_refused_at_once(name: str) -> None:
    """Their statistics are files, and are written after hours."""
    tree = {"task": "student", "teachers": {NAMES[name]: {"kind": "timm", "model": "test_vit"}}}
    with pytest.raises(RecipeError, match="a teacher's name is letters, digits and _, at most 100"):
        validate(StudentRecipe, tree | _MINIMAL, "recipe")


_MINIMAL: dict[str, Any] = {
    "run": {"dir": "x", "steps": 1, "resolution": 32, "batch_size": 1},
    "data": {"sources": [{"shards": "x.tar"}]},
    "student": {"width": 32, "depth": 1, "heads": 1, "patch_size": 16},
}
