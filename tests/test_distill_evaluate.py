"""`distill.evaluate` and `distill.visualize` on a run whose student was never trained."""

import base64
import html.parser
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.files import write_text
from data.images import load_images
from distill import evaluate, visualize
from distill.display.columns import Column, layout
from distill.evaluation import student_run
from distill.evaluation.student_page import shown_student
from distill.runtime.checkpoint import save_checkpoint
from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import open_run_folder
from distill.targets.target_statistics import CalibrationBatch, load_statistics
from distill.tasks.build import build_student, build_targets, build_teachers
from distill.tasks.student_recipe import load_student_recipe
from distill.tasks.trained import find_trained
from distill.training.training_recipe import resolved
from student.storage import load_student, save_student
from tests.tiny_run import write_images, write_recipe

HELD_OUT = {"resolutions": [32, [48, 32]], "batch_size": 2}


def _write_run(folder: Path) -> Path:
    """A recipe whose run has the initial weights as step 3."""
    write_images(folder / "held-out", 3)
    path = write_recipe(folder, evaluation={**HELD_OUT, "images": str(folder / "held-out")})
    recipe = load_student_recipe(path, [])
    teachers = build_teachers(recipe)
    targets = build_targets(recipe, teachers)
    images, _ = load_images(folder / "images", (32, 32))
    running = targets.ensemble.teachers
    routes, before = dict.fromkeys(running, "auto"), dict.fromkeys(running, 0)
    shown = CalibrationBatch(images.float() / 255, routes, before)
    targets.statistics.fit(targets.ensemble, iter([shown]), folder / "fitted", {}, len(images))
    student = build_student(recipe, teachers)

    def write(checkpoint: Path) -> None:
        weights = student.state_dict()
        save_student(
            checkpoint / "student.safetensors", student.config, student.targets, weights, {}
        )
        targets.statistics.save(checkpoint / "statistics")
        write_text(checkpoint / "recipe.yaml", dump_yaml(resolved(recipe)))

    save_checkpoint(recipe.run.dir / "checkpoints", 3, write, {}, keep=2)
    write_text(recipe.run.dir / "recipe.yaml", dump_yaml(resolved(recipe)))
    lines = [{"step": s, "loss": 1 / s, "loss/expert/spatial": 2 / s} for s in (1, 2, 3)]
    write_text(recipe.run.dir / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    """The recipe of a run of the test's own."""
    run = tmp_path / "run"
    shutil.copytree(made.parent / "run", run)
    tree = made.read_text().replace(str(made.parent / "run"), str(run))
    (tmp_path / "recipe.yaml").write_text(tree)
    return tmp_path / "recipe.yaml"


def _call(command: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _rows(run: Path) -> list[dict]:
    return [json.loads(x) for x in (run / "evaluation/fidelity.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_initial_weights_measure_as_the_untrained_student(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _call(evaluate, monkeypatch, recipe) == 0
    rows = _rows(recipe.parent / "run")
    sizes = [row["resolution"] for row in rows]
    assert sizes == [[32, 32], [32, 32], [48, 32], [48, 32]]
    for untrained, trained in zip(rows[::2], rows[1::2], strict=True):
        assert (untrained.pop("student"), trained.pop("student")) == ("untrained", "trained")
        assert untrained == trained


def test_other_weights_measure_otherwise_and_as_computed_by_hand(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = find_trained(recipe, [])
    file = trained.checkpoint / "student.safetensors"
    student = load_student(file)
    with torch.no_grad():
        for parameter in student.heads.parameters():
            parameter.zero_()  # the map's head predicts zero, the mean of the training images
    save_student(file, student.config, student.targets, student.state_dict(), {})
    assert _call(evaluate, monkeypatch, recipe) == 0
    row = next(r for r in _rows(recipe.parent / "run") if r["student"] == "trained")
    targets = build_targets(trained.recipe, build_teachers(trained.recipe))
    path = trained.checkpoint / "statistics/expert.safetensors"
    statistics = load_statistics(path, "checkpoint")
    assert statistics is not None
    images, names = load_images(trained.recipe.evaluation.images, (32, 32))
    spatial = targets.ensemble(images.float() / 255)["expert"].spatial
    wanted = statistics.phi_s(spatial).double()
    variance = wanted.var((0, 2, 3), correction=0).mean()
    assert row["fidelity"] == pytest.approx(float(variance / wanted.square().mean()), rel=1e-5)
    assert row["images"] == names
    assert row["step"] == 3


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.descriptions: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        self.descriptions += [value or "" for key, value in attrs if key == "alt"]


def test_the_page_is_one_file_with_the_table_panels_and_losses(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(evaluate, monkeypatch, recipe.parent / "run") == 0
    page = recipe.parent / "run/page/index.html"
    assert capsys.readouterr().out.endswith(f"page: {page}\n")
    text = page.read_text()
    shown = _Page(text)
    assert shown.tags.count("img") == 3  # panels at two resolutions, losses
    assert shown.tags.count("style") == 1
    assert 'name="viewport"' in text
    assert shown.descriptions == [
        *(
            f"Feature maps at {size} px: for each image those of its teachers, and beside each "
            "what the student predicts of it, after and before training"
            for size in ("32 x 32", "48 x 32")
        ),
        "Curves of the losses; the total goes from 1.000 at step 1 to 0.333 at step 3",
    ]
    assert all(source.startswith("data:image/png;base64,") for source in shown.sources)
    for row in _rows(recipe.parent / "run"):
        assert f">{row['fidelity']:.3f}</td>" in text
    picture = page.with_name("teachers_in_student.png").read_bytes()
    assert base64.b64encode(picture).decode() in shown.sources[0]  # the first on the page


@pytest.mark.parametrize("start", [None, "agglo_tiny"])
def test_a_student_that_started_from_another_is_compared_with_that_start(
    start: str | None, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_run, "started_from", lambda config: start)
    titles: list[list[str]] = []
    monkeypatch.setattr(student_run, "draw_panels", lambda p, i, t, o, c: titles.append([*o, c]))
    shutil.copytree(made.parent / "run", tmp_path / "run")
    (tmp_path / "run/evaluation").mkdir()
    monkeypatch.setattr(student_run, "write_page", lambda *_: tmp_path)
    overrides = [f"run.dir={tmp_path / 'run'}", "evaluation.resolutions=[32]"]
    rows, _ = student_run.evaluate_student(find_trained(made, overrides))
    before = "start" if start else "untrained"
    assert titles[0][:2] == ["student", before]
    assert titles[0][2]["expert"][before][0] == f"fidelity {rows[0]['fidelity']:.2f}"
    assert [row.get("started_from") for row in rows] == [start] * 2
    assert [shown_student(row) for row in rows] == [before, "trained"]
    assert [row["student"] for row in rows] == ["untrained", "trained"]  # for programs


def test_run_recipe_and_checkpoint_name_the_same_student(recipe: Path) -> None:
    run = recipe.parent / "run"
    found = [find_trained(p, []) for p in (recipe, run, run / "checkpoints/step-00000003")]
    assert {(each.run, each.checkpoint, each.step) for each in found} == {
        (run, run / "checkpoints/step-00000003", 3)
    }


def test_a_run_without_a_checkpoint_is_a_mistake_that_names_the_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "run/checkpoints/step-00000003/student.safetensors").unlink()
    assert _call(evaluate, monkeypatch, recipe) == 2
    run = recipe.parent / "run"
    complaint = f"{run}: no complete checkpoint in {run / 'checkpoints'}; train first"
    assert complaint in capsys.readouterr().err


def test_mistakes_are_told_apart(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="empty: no recipe.yaml in it; give a recipe"):
        find_trained(tmp_path / "empty", [])
    checkpoint = tmp_path / "run/checkpoints/step-00000003"
    (checkpoint / "statistics/expert.json").unlink()
    with pytest.raises(RecipeError, match="step-00000003: the checkpoint is incomplete"):
        find_trained(checkpoint, [])
    with pytest.raises(RecipeError, match="evaluation.resolutions.1: .*the nearest are .64, 32."):
        find_trained(recipe, ["evaluation.resolutions=[32,[60,32]]"])


def test_a_recipe_that_evaluates_nothing_says_what_to_add(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(evaluate, monkeypatch, recipe, "evaluation=null") == 2
    assert "evaluation.images=FOLDER" in capsys.readouterr().err


def test_a_missing_folder_of_images_is_a_mistake_before_any_teacher_is_built(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(student_run, "load_trained", lambda trained: pytest.fail("built teachers"))
    monkeypatch.chdir(recipe.parent)
    assert _call(evaluate, monkeypatch, recipe, "evaluation.images=absent") == 2
    complaint = f"error: evaluation.images: there is no {recipe.parent / 'absent'}; set it to"
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("other", ["student.width=64", "student.final_norm=true"])
def test_another_student_than_the_recipes_is_a_mistake(
    other: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(evaluate, monkeypatch, recipe, other) == 2
    assert "trained with other teachers or another student" in capsys.readouterr().err


def test_visualize_draws_a_row_an_image(
    recipe: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [made.parent / f"held-out/{i}.png" for i in (0, 2)]
    out = tmp_path / "two.png"
    arguments = [recipe, *images, "--out", out, "--resolution", 48]
    assert _call(visualize, monkeypatch, *arguments) == 0
    with Image.open(out) as picture:
        columns = [Column("", torch.zeros(2, 3, 48, 48), group) for group in ("", "t", "t")]
        assert picture.size == layout(columns).size


@pytest.mark.parametrize(
    "option, message",
    [
        (("--resolution", 40), "the student takes multiples of 16 px; the nearest is 32"),
        (("--out", "x.gif"), "--out x.gif: expected a .png file"),
    ],
)
def test_visualize_explains_wrong_options(
    recipe: Path,
    made: Path,
    option: tuple,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call(visualize, monkeypatch, recipe, made.parent / "held-out/0.png", *option) == 2
    assert message in capsys.readouterr().err


def test_a_run_goes_on_with_another_evaluation(recipe: Path) -> None:
    changed = load_student_recipe(recipe, ["evaluation.resolutions=[64]"])
    open_run_folder(changed.run.dir, resolved(changed))
    other = load_student_recipe(recipe, ["student.width=64"])
    with pytest.raises(RecipeError, match="another recipe"):
        open_run_folder(other.run.dir, resolved(other))
