"""A student's run looks at the data of its benchmarks before it builds a teacher."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from distill.tasks import student_run
from distill.tasks.student_recipe import StudentRecipe
from teachers.errors import TeacherError
from tests.label_sets import halves, write_labels


def recipe(folder: Path, **changes: Any) -> StudentRecipe:
    maps = {"train": [halves(0, 1)], "test": [halves(1, 0)]}
    entry = {
        "kind": "segmentation",
        "dataset": write_labels(folder / "set", maps) | {"classes": ["a", "b"]},
        "probe": {"steps": 1, "batch_size": 1, "lr": 0.1},
    }
    return StudentRecipe.model_validate(
        {
            "run": {"dir": folder / "run", "steps": 2, "resolution": 32, "batch_size": 1},
            "data": {"sources": [{"shards": str(folder)}]},
            "teachers": {"expert": {"kind": "timm", "model": "test_vit", "weights": "none"}},
            "student": {"size": "tiny"},
            "benchmarks": {"every": 1, "run": {"streets": entry | changes}},
        }
    )


@pytest.mark.parametrize("step", ["assemble", "preview"])
def test_missing_data_of_a_benchmark_come_before_any_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(StudentRecipe, "open_stream", lambda *_: None)
    monkeypatch.setattr(student_run, "build_teachers", lambda *_, **__: pytest.fail("built"))
    found = recipe(tmp_path)
    (tmp_path / "set/annotations/validation/test0.png").unlink()
    with pytest.raises(DataError, match=r"benchmarks\.run\.streets: .*no label map"):
        getattr(student_run, step)(found)


def test_a_student_that_does_not_fit_comes_before_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StudentRecipe, "open_stream", lambda *_: None)
    monkeypatch.setattr(student_run, "fit_statistics", lambda *_: pytest.fail("estimated"))
    found = recipe(tmp_path, input={"crop": "native", "stride": [64, 64]})
    with pytest.raises(TeacherError, match=r"benchmarks\.run\.streets: input\.stride: expected at"):
        student_run.assemble(found)
