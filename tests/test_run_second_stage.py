"""A run that goes on from another run's student: its map heads keep the space they speak in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.formats.export import export_student
from distill.runtime.tracking import read_metrics
from distill.targets.target_statistics import TargetStatistics
from distill.tasks.build import inherited_statistics
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.trained import find_trained, load_trained
from student.storage import load_student, read_header
from tests.tiny_run import STEPS, plain_command, run, write_recipe

pytestmark = pytest.mark.process

LAST = f"checkpoints/step-{STEPS:08d}"
CALM = {"lr": 1e-3}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a first stage."""
    folder = tmp_path_factory.mktemp("first")
    done = run(plain_command(write_recipe(folder, run={"steps": STEPS}, optimizer=CALM)), folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def second(folder: Path, first: Path, **sections: Any) -> Path:
    init = {"kind": "student", "path": str(first / LAST / "student.safetensors")}
    student = {"init": init, **sections.pop("student", {})}
    stage = {"run": {"resolution": 64, "steps": 2, **sections.pop("run", {})}}
    return write_recipe(folder, student=student, optimizer=CALM, **stage, **sections)


def inherited(recipe: Path, *overrides: str) -> dict[str, TargetStatistics]:
    return inherited_statistics(load_student_recipe(recipe, overrides))


def test_a_second_stage_standardises_as_the_first_and_goes_on_at_its_loss(
    first: Path, tmp_path: Path
) -> None:
    recipe = second(tmp_path, first)
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "{'expert': 'inherited'}" in done.stderr
    path = "statistics/expert.safetensors"
    ours = load_file(tmp_path / "run/checkpoints/step-00000002" / path)
    theirs = load_file(first / LAST / path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = read_metrics(first)
    key = "loss/expert/spatial"
    # Of other images at another size, but nearer to where it ended than to where it began.
    assert read_metrics(tmp_path / "run")[0][key] < (before[0][key] + before[-1][key]) / 2


def test_heads_in_their_teachers_spaces_go_on_in_that_of_the_new_statistics(
    first: Path, tmp_path: Path
) -> None:
    """Those of a student that ships, in half precision and without its statistics."""
    stored = tmp_path / "box/student.safetensors"
    export_student(first, stored, teacher_space=True, half=True)
    init = {"kind": "student", "path": str(stored)}
    spectral = {"spectral": "all"}
    recipe = second(tmp_path, first, student={"init": init}, reparametrisation=spectral)
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "{'expert': 'estimated'}" in done.stderr
    before = read_metrics(first)
    key = "loss/expert/spatial"
    assert read_metrics(tmp_path / "run")[0][key] < (before[0][key] + before[-1][key]) / 2
    students, targets = load_trained(find_trained(tmp_path / "run", []))
    images = torch.rand(1, 3, 32, 32)
    own = load_student(stored)(images).heads["expert"]
    start = students["untrained"](images).heads["expert"]
    due = targets.statistics.apply("expert", own)
    torch.testing.assert_close(start.spatial, due.spatial, atol=1e-4, rtol=1e-4)
    assert torch.equal(start.summary, own.summary)
    assert inherited(recipe) == {}
    silent = "objective.weights={expert: {summary: 0, spatial: 0}}"
    identity = inherited(recipe, silent)["expert"].phi_s  # or an export would fold another space
    assert torch.equal(identity(own.spatial), own.spatial)


def test_a_head_whose_teacher_does_not_run_keeps_its_statistics(
    first: Path, tmp_path: Path
) -> None:
    silent = {"weights": {"expert": {"summary": 0, "spatial": 0}}}
    new = {"kind": "timm", "model": "test_vit2", "weights": "none", "resolution": [64, 64]}
    recipe = second(tmp_path, first, teachers={"new": new}, objective=silent)
    done = run(plain_command(recipe), tmp_path)
    assert done.returncode == 0, done.stderr
    statistics = tmp_path / "run/checkpoints/step-00000002/statistics"
    ours = load_file(statistics / "expert.safetensors")
    theirs = load_file(first / LAST / "statistics/expert.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (statistics / "new.safetensors").is_file()


@pytest.mark.parametrize(
    "override",
    [
        "student.init.heads=false",
        "student.init=null",
        "objective.standardisation=none",
    ],
)
def test_nothing_is_inherited_without_heads_or_axes(
    first: Path, tmp_path: Path, override: str
) -> None:
    assert set(inherited(second(tmp_path, first))) == {"expert"}
    assert inherited(tmp_path / "recipe.yaml", override) == {}


def test_another_size_and_an_upsampler_leave_the_encoder_what_it_is(
    first: Path, tmp_path: Path
) -> None:
    recipe = second(tmp_path, first)
    upsampled = "teachers.expert.upsampler={kind: tile, factor: 2}"
    assert set(inherited(recipe, upsampled)) == {"expert"}


def test_another_encoder_of_that_name_inherits_nothing(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert inherited(second(tmp_path, first), "teachers.expert.model=test_vit2") == {}
    assert "expert is another encoder there; its head is not reused" in caplog.text


def test_a_file_without_its_statistics_is_told(
    first: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((first / LAST / "student.safetensors").read_bytes())
    assert inherited(second(tmp_path, first), f"student.init.path={alone}") == {}
    assert "the head of expert is reused, but" in caplog.text


def test_an_encoder_whose_entry_differs_is_known_by_its_fingerprint(
    first: Path, tmp_path: Path
) -> None:
    """As that of weights at another path; the entry tells where a file has no fingerprints."""
    recipe = load_student_recipe(second(tmp_path, first), ["teachers.expert.chunk_size=null"])
    header = read_header(first / LAST / "student.safetensors")
    fingerprints = json.loads(header.metadata["fingerprints"])
    teacher = recipe.teachers["expert"].model_copy(update={"model": "at_another_place"})
    moved = recipe.model_copy(update={"teachers": {"expert": teacher}})
    assert list(inherited_statistics(moved, fingerprints)) == ["expert"]
    assert inherited_statistics(moved, {"expert": "another"}) == {}
    assert inherited_statistics(moved) == {}
