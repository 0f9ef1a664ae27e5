"""Suites: what is measured, what is not measured again, and what a user is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from distill import evaluate
from distill.benchmarks.benchmark import Benchmark, Measurement
from distill.evaluate import parse_arguments
from distill.evaluation.models import Pixels, PixelsConfig, model_of, parse_model
from distill.evaluation.results import results_tables
from distill.evaluation.run import evaluate as evaluate_recipe
from distill.evaluation.suite import SuiteRecipe, read_results, run_suite
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from teachers.build import build_teacher
from teachers.errors import TeacherError
from teachers.teacher import Teacher

CALLS: list[tuple[str, int]] = []


class Counting(Benchmark):
    """Its figure is the seed; it keeps what it was called with."""

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        assert folder.is_dir()
        CALLS.append((type(encoder).__name__, seed))
        return Measurement({"score": float(seed), "error": 1.0 + seed}, {"images": 3})

    lower_is_better = frozenset({"error"})


class Certain(Counting):
    seeded = False


def recipe(folder: Path, **changes: Any) -> SuiteRecipe:
    tree: dict[str, Any] = {
        "task": "benchmarks",
        "dir": str(folder / "results"),
        "models": {"colours": {"kind": "pixels"}},
        "benchmarks": {"counted": {"kind": "tests.test_evaluation_suite:Counting"}},
        "seeds": [3, 5],
    }
    return validate(SuiteRecipe, tree | changes, "suite")


@pytest.fixture(autouse=True)
def _forget() -> None:
    CALLS.clear()


def test_every_model_meets_every_benchmark_once_a_seed(tmp_path: Path) -> None:
    rows = run_suite(recipe(tmp_path))
    assert [(row["model"], row["benchmark"], row["seed"]) for row in rows] == [
        ("colours", "counted", 3),
        ("colours", "counted", 5),
    ]
    assert [row["figures"]["score"] for row in rows] == [3.0, 5.0]
    assert rows == read_results(tmp_path / "results")
    assert rows[0]["lower_is_better"] == ["error"]
    assert rows[0]["encoder"]["patch_size"] == 16
    assert {"torch", "git"} <= rows[0]["versions"].keys()


def test_what_does_not_depend_on_the_seed_is_measured_once(tmp_path: Path) -> None:
    entry = {"counted": {"kind": "tests.test_evaluation_suite:Certain"}}
    assert len(run_suite(recipe(tmp_path, benchmarks=entry))) == 1


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    run_suite(recipe(tmp_path))
    run_suite(recipe(tmp_path, seeds=[3, 5, 7]))
    assert [seed for _, seed in CALLS] == [3, 5, 7]


def test_another_entry_of_the_same_name_is_measured_again(tmp_path: Path) -> None:
    run_suite(recipe(tmp_path))
    changed = {"colours": {"kind": "pixels", "patch_size": 8}}
    rows = run_suite(recipe(tmp_path, models=changed))
    assert len(CALLS) == 4
    assert read_results(tmp_path / "results") == rows


def test_results_of_older_versions_get_the_metric_keys_of_today(tmp_path: Path) -> None:
    names = {"AP": 1.0, "AP small": 2.0, "seam ratio": 3.0}
    old = {"figures": names, "lower_is_better": ["seam ratio"]}
    old["encoder"] = {"kind": "distill.evaluation.models:Pixels"}
    lines = [old | {"entry": {"kind": kind}} for kind in ("detection", "my.module:Mine")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ours, theirs = read_results(tmp_path)
    assert ours["figures"] == {"ap": 1.0, "ap_small": 2.0, "seam_ratio": 3.0}
    assert ours["lower_is_better"] == ["seam_ratio"]
    assert theirs == lines[1] | {"encoder": {"kind": "pixels"}}


def test_a_table_has_means_spreads_and_the_best_in_bold(tmp_path: Path) -> None:
    rows = run_suite(recipe(tmp_path))
    better = [{**row, "model": "better", "figures": {"score": 9.0, "error": 0.5}} for row in rows]
    table = results_tables(rows + better)[0].to_rich()
    cells = [list(column.cells) for column in table.columns]
    assert table.columns[3].header == "error (lower is better)"
    assert cells[0] == ["colours", "better"]
    assert cells[2] == ["4 ± 1.4", "[bold]9 ± 0[/bold]"]
    assert cells[3] == ["5 ± 1.4", "[bold]0.5 ± 0[/bold]"]


def test_a_table_too_wide_for_a_screen_has_a_line_for_each_figure(tmp_path: Path) -> None:
    rows = [
        {**row, "figures": {f"figure{i}": float(i) for i in range(9)}}
        for row in run_suite(recipe(tmp_path))
    ]
    table = results_tables(rows)[0].to_rich()
    assert [column.header for column in table.columns] == ["model", "colours"]
    assert list(table.columns[0].cells) == ["seeds", *(f"figure{i}" for i in range(9))]
    assert list(table.columns[1].cells)[:3] == ["2", "[bold]0 ± 0[/bold]", "[bold]1 ± 0[/bold]"]


def test_pixels_are_mean_colours() -> None:
    encoder = Pixels(PixelsConfig(patch_size=2, resolution=(4, 4)))
    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    summary, spatial = encoder(images)
    assert summary is not None
    assert summary.shape == (1, 192)
    expected = (images[0, :, 2:4, 4:6].mean((1, 2)) - 0.5) / 0.25
    assert torch.allclose(spatial[0, :, 1, 2], expected)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"kind": "pixel"}, r"did you mean 'pixels'.*choose one of"),
        ({"recipe": "recipes/quickstart.yaml"}, r"`teacher` is missing"),
        ({"recipe": "recipes/quickstart.yaml", "teacher": "x", "y": 1}, "unknown y"),
        (
            {"recipe": "recipes/quickstart.yaml", "teacher": "clipp"},
            "no teacher 'clipp'.*mean 'clip'",
        ),
    ],
)
def test_a_wrong_model_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises((RecipeError, TeacherError), match=message):
        parse_model(entry)


def test_a_wrong_benchmark_is_refused(tmp_path: Path) -> None:
    entry = {"counted": {"kind": "tests.test_evaluation_suite:Counted"}}
    with pytest.raises(RecipeError, match=r"benchmarks.counted: .*no class 'Counted'.*'Counting'"):
        recipe(tmp_path, benchmarks=entry)


def test_a_teacher_of_a_recipe_comes_with_its_upsampler() -> None:
    config = parse_model({"recipe": "recipes/quickstart.yaml", "teacher": "clip"})
    assert config.upsampler is not None
    assert build_teacher(config, device="meta").spec.resolution == (256, 256)


def test_a_target_is_a_student_or_a_timm_name(tmp_path: Path) -> None:
    assert model_of(str(tmp_path)) == {"kind": "student", "path": str(tmp_path)}
    assert model_of("test_vit") == {"kind": "timm", "model": "test_vit"}
    with pytest.raises(RecipeError, match="nor a timm model .did you mean 'test_vit"):
        model_of("test_vitt")


def test_the_command_takes_a_target_and_a_suite() -> None:
    arguments = parse_arguments(["runs/x", "--on", "suite.yaml", "seeds=[1]"])
    assert (arguments.target, arguments.on, arguments.overrides) == (
        "runs/x",
        Path("suite.yaml"),
        ["seeds=[1]"],
    )


def test_results_are_whole_lines_of_json(tmp_path: Path) -> None:
    run_suite(recipe(tmp_path))
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [3, 5]


def test_other_tasks_take_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["evaluate", "recipes/evaluation/throughput.yaml"])
    with pytest.raises(RecipeError, match="task: throughput runs in one process"):
        evaluate.main.__wrapped__()  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", ['{"broken', "[]", "{}", '{"encoder": 3}'])
def test_a_line_that_is_no_row_of_results_is_named(tmp_path: Path, line: str) -> None:
    run_suite(recipe(tmp_path))
    with (tmp_path / "results/results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"results.jsonl', line 3: .*mend or remove the line"):
        run_suite(recipe(tmp_path))


def test_a_seed_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="seeds: 3 occurs twice"):
        recipe(tmp_path, seeds=[3, 5, 3])


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "{task: benchmarks, dir: /proc/nowhere, models: {a: {kind: pixels}}, "
        "benchmarks: {b: {kind: 'tests.test_evaluation_suite:Counting'}}}"
    )
    with pytest.raises(RecipeError, match="dir: /proc/nowhere cannot be made"):
        evaluate_recipe(str(tmp_path / "suite.yaml"), [])
