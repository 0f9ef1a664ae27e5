"""A student's agreement with its teachers by resolution."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.evaluation.models import Pixels, PixelsConfig, parse_model
from distill.evaluation.resolution_sweep import largest_drop
from distill.evaluation.student_run import evaluate_student
from distill.tasks.trained import find_trained
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from tests.tiny_run import plain_command, run, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run."""
    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_recipe(folder, run={"steps": 2})
    done: subprocess.CompletedProcess[str] = run(plain_command(recipe), folder)
    assert done.returncode == 0, done.stderr
    return folder


def student(folder: Path, **options: Any) -> Teacher:
    return build_teacher(parse_model({"kind": "student", "path": str(folder / "run"), **options}))


def measure(encoder: Teacher, images: Path, folder: Path, sizes: list[Any]) -> Measurement:
    entry = {"kind": "resolution_sweep", "images": str(images), "resolutions": sizes}
    return build_benchmark(parse_benchmark(entry)).measure(encoder, 0, folder)


@pytest.mark.process
def test_the_curve_is_what_evaluating_the_run_says(trained: Path, tmp_path: Path) -> None:
    images = trained / "images"
    figures, protocol = measure(student(trained), images, tmp_path, [64, 32, [32, 48]])
    curve = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert [row["resolution"] for row in curve] == [[32, 32], [32, 48], [64, 64]]
    overrides = [f"evaluation.images={images}", "evaluation.resolutions=[32,[32,48],64]"]
    rows, _ = evaluate_student(find_trained(trained / "run", overrides))
    trained_rows = [row for row in rows if row["student"] == "trained"]
    for actual, expected in zip(curve, trained_rows, strict=True):
        assert {key: expected[key] for key in actual} == actual
    cosines = [row["spatial_cosine"] for row in trained_rows]
    assert figures == {
        "largest_cosine_drop": largest_drop(cosines),
        "expert_lowest_cosine": min(cosines),
        "expert_lowest_fidelity": min(row["fidelity"] for row in trained_rows),
    }
    assert protocol == {"images": 24, "step": 2, "standardisation": "phi_s"}
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.process
def test_a_head_alone_and_untrained_weights_can_be_measured(trained: Path, tmp_path: Path) -> None:
    images = trained / "images"
    one = measure(student(trained, head="expert"), images, tmp_path, [32, 64]).metrics
    other = measure(student(trained, untrained=True), images, tmp_path, [32, 64]).metrics
    assert one.keys() == other.keys()
    assert one["expert_lowest_fidelity"] != other["expert_lowest_fidelity"]


@pytest.mark.process
def test_only_a_student_with_its_run_can_be_measured(trained: Path, tmp_path: Path) -> None:
    (file,) = (trained / "run").rglob("step-00000002/student.safetensors")
    exported = build_teacher(parse_model({"kind": "student", "path": str(file)}))
    for encoder in (Pixels(PixelsConfig()), exported):
        with pytest.raises(TeacherError, match="must be {kind: student, path: RUN}"):
            measure(encoder, trained / "images", tmp_path, [32, 64])


@pytest.mark.parametrize(
    "values, drop",
    [([0.9, 0.8, 0.85, 0.2], 0.65), ([0.1, 0.5, 0.5], 0.0), ([0.9], 0.0), ([0.3, 0.1, 0.1], 0.2)],
)
def test_the_largest_drop_is_between_neighbours(values: list[float], drop: float) -> None:
    assert largest_drop(values) == pytest.approx(drop)
