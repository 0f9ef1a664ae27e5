"""Measurements that are kept: only of the data that are there now, and never without a word."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from distill.evaluation.kinds import register_evaluation_kinds
from distill.evaluation.results import read_suites
from distill.evaluation.suite import SuiteRecipe, read_results, run_suite
from distill.runtime.config import validate
from distill.runtime.errors import RecipeError
from tests.label_sets import halves, write_labels

LEFT, RIGHT = halves(0, 1), halves(1, 0)


@pytest.fixture(autouse=True)
def _kinds() -> None:
    register_evaluation_kinds()


def write(root: Path) -> Path:
    write_labels(root, {"train": [LEFT, RIGHT], "test": [LEFT, RIGHT]})
    return root


def suite(folder: Path, root: Path, **changes: Any) -> SuiteRecipe:
    tree: dict[str, Any] = {
        "task": "benchmarks",
        "dir": str(folder / "results"),
        "models": {"colours": {"kind": "pixels", "patch_size": 4, "resolution": [8, 8]}},
        "benchmarks": {
            "halves": {
                "kind": "segmentation",
                "dataset": {"kind": "folder", "root": str(root), "classes": ["a", "b"]},
                "probe": {"steps": 2, "batch_size": 2, "lr": 0.01, "mode": "cached"},
            }
        },
    }
    return validate(SuiteRecipe, tree | changes, "suite")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]


def age(path: Path, seconds: float) -> None:
    """Makes files older by their time of modification."""
    for each in (path, *path.rglob("*")):
        at = each.stat().st_mtime - seconds
        os.utime(each, (at, at))


def test_what_is_kept_is_said_with_its_date_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = suite(tmp_path, write(tmp_path / "set"))
    rows = run_suite(recipe)
    assert said(capsys) == "halves: colours, seed 0"
    assert run_suite(recipe) == rows
    results = tmp_path / "results/results.jsonl"
    assert said(capsys) == f"halves: colours, seed 0: kept from {rows[0]['measured']}, {results}"


def test_mended_masks_are_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = suite(tmp_path, write(tmp_path / "set"))
    (before,) = run_suite(recipe)
    path = tmp_path / "set/annotations/validation/test0.png"
    Image.fromarray(halves(1, 1)).save(path)
    (after,) = run_suite(recipe)
    assert "measured again: its data have changed since" in said(capsys)
    assert before["figures"] != after["figures"]
    assert before["data"]["contents"] != after["data"]["contents"]
    assert read_results(tmp_path / "results") == [after]


def test_the_same_files_in_other_splits_are_other_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_labels(tmp_path / "set", {"train": [LEFT, RIGHT, LEFT]})
    root = tmp_path / "set"
    (root / "annotations/training").rename(root / "labels")
    for path in (root / "images/training").iterdir():
        path.rename(root / "images" / path.name)
    for path in (root / "labels").iterdir():
        colours = np.array([(128, 0, 0), (128, 0, 128)], np.uint8)[np.asarray(Image.open(path))]
        Image.fromarray(colours).save(path)
    (root / "train.txt").write_text("train0\ntrain1\n")
    (root / "test.txt").write_text("train2\n")
    entry = {
        "kind": "segmentation",
        "dataset": {"kind": "labelme_facade", "root": str(root)},
        "probe": {"steps": 1, "batch_size": 1, "lr": 0.01},
    }
    recipe = suite(tmp_path, root, benchmarks={"halves": entry})
    run_suite(recipe)
    (root / "train.txt").write_text("train0\ntrain2\n")
    (root / "test.txt").write_text("train1\n")
    run_suite(recipe)
    assert "measured again: its data have changed since" in said(capsys)


@pytest.mark.parametrize("how", ["touched", "copied", "moved"])
def test_the_same_contents_elsewhere_or_later_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    root = write(tmp_path / "set")
    (before,) = run_suite(suite(tmp_path, root))
    now = root
    if how == "touched":
        age(root, -100)
    else:
        now = tmp_path / "elsewhere"
        (shutil.move if how == "moved" else shutil.copytree)(root, now)
    (after,) = run_suite(suite(tmp_path, now))
    assert ": kept from " in said(capsys)
    assert after["figures"] == before["figures"]
    assert after["entry"]["dataset"]["root"] == str(now)
    assert read_results(tmp_path / "results") == [after]


def test_times_alone_measure_a_copy_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = suite(tmp_path, write(tmp_path / "set"), data_digest="times")
    run_suite(recipe)
    age(tmp_path / "set", -100)
    run_suite(recipe)
    assert "measured again" in said(capsys)


def old_row(folder: Path) -> Path:
    """Makes the only row of a suite one of an older version, which did not record its data."""
    path = folder / "results/results.jsonl"
    row = json.loads(path.read_text())
    del row["data"], row["measured"]
    row["entry"]["input"]["flip"] = row["protocol"]["input"]["flip"] = True
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_row_of_an_older_version_is_kept_while_no_file_is_newer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = suite(tmp_path, write(tmp_path / "set"))
    (before,) = run_suite(recipe)
    old_row(tmp_path)
    (after,) = run_suite(recipe)
    text = said(capsys)
    assert ": kept from 20" in text
    assert "an older version did not record its data, but no file has changed since" in text
    assert after["data"] == before["data"]  # recorded from now on
    assert after["entry"] == before["entry"]
    run_suite(recipe)
    assert "older version" not in said(capsys)


def test_a_row_of_an_older_version_is_measured_again_if_a_file_is_newer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = suite(tmp_path, write(tmp_path / "set"))
    run_suite(recipe)
    old_row(tmp_path)
    age(tmp_path / "results", 3600)
    time.sleep(0.01)
    run_suite(recipe)
    assert "measured again: an older version did not record its data, and files have" in said(
        capsys
    )


def test_a_fatal_finding_comes_before_any_measurement_and_can_be_overruled(tmp_path: Path) -> None:
    write_labels(tmp_path / "set", {"train": [halves(0, 255)], "test": [halves(0, 255)]})
    with pytest.raises(DataError, match=r"(?s)benchmarks.halves:.*accepted_data=\[halves\]"):
        run_suite(suite(tmp_path, tmp_path / "set"))
    assert not (tmp_path / "results/results.jsonl").exists()
    (row,) = run_suite(suite(tmp_path, tmp_path / "set", accepted_data=["halves"]))
    assert row["figures"]["miou"] == 100


def test_accepted_data_are_names_of_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="accepted_data: .*no benchmark 'halvs'.*mean 'halves'"):
        suite(tmp_path, tmp_path, accepted_data=["halvs"])


def test_depth_is_not_measured_on_figures_of_another_set(tmp_path: Path) -> None:
    """Two sets of one shape under one root, one after the other."""
    root = write(tmp_path / "set")
    run_suite(suite(tmp_path, root))
    shutil.rmtree(root)
    write_labels(root, {"train": [RIGHT, LEFT], "test": [RIGHT, np.flipud(LEFT)]})
    (row,) = run_suite(suite(tmp_path, root))
    assert row["data"]["files"] == 8


def test_a_report_refuses_figures_on_other_data(tmp_path: Path) -> None:
    folders = []
    for name, left in (("one", 0), ("two", 1)):
        maps = {"train": [LEFT, RIGHT], "test": [halves(left, 1 - left)]}
        write_labels(tmp_path / name / "set", maps)
        models = {name: {"kind": "pixels", "patch_size": 4, "resolution": [8, 8]}}
        run_suite(suite(tmp_path / name, tmp_path / name / "set", models=models))
        folders.append(tmp_path / name / "results")
    place = ["entry.dataset.root"]
    with pytest.raises(
        RecipeError, match=r"data: 6 files there, 6 here, of other contents. Measure"
    ):
        read_suites(folders, place)
    assert len(read_suites(folders, [*place, "data"])) == 2
    old_row(tmp_path / "one")  # which cannot tell
    flags = ["entry.input.flip", "protocol.input.flip"]
    assert len(read_suites(folders, [*place, *flags])) == 2
