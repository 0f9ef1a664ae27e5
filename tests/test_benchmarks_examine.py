"""The data of all benchmarks are listed, counted and judged before anything is measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.label_survey import LabelSurvey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.examine import examine
from distill.runtime import distributed
from teachers.teacher import Teacher
from tests.label_sets import halves, metres, write_depth, write_labels

PROBE = {"steps": 2, "batch_size": 2, "lr": 0.01}
GOOD = {"train": [halves(0, 1)] * 2, "test": [halves(1, 0)]}


def labels(root: Path, maps: Any = GOOD, **changes: Any) -> dict[str, Any]:
    dataset = write_labels(root, maps) | {"classes": ["a", "b"]} | changes
    return {"kind": "segmentation", "dataset": dataset, "probe": PROBE}


def depth(root: Path, **changes: Any) -> dict[str, Any]:
    dataset = write_depth(root, [metres()]) | changes
    return {"kind": "depth", "dataset": dataset, "probe": PROBE, "head": {"kind": "linear"}}


def looked_at(folder: Path | None = None, **entries: Any) -> dict[str, Any]:
    accepted = entries.pop("accepted", ())
    built = {name: build_benchmark(parse_benchmark(entry)) for name, entry in entries.items()}
    return examine(built, folder, accepted=accepted)


def test_the_record_is_kept_beside_the_pictures(tmp_path: Path) -> None:
    found = looked_at(tmp_path / "out", halves=labels(tmp_path / "set"))
    kept = json.loads((tmp_path / "out/halves/data.json").read_text())
    assert kept["data"] == found["halves"]
    assert kept["counts"]["train"]["classes"] == [64, 64]
    assert kept["findings"] == []
    assert found["halves"]["files"] == 6


def test_labels_are_counted_again_only_when_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, count = [], LabelSurvey.count
    monkeypatch.setattr(LabelSurvey, "count", lambda self: calls.append(1) or count(self))
    entry = labels(tmp_path / "set")
    first = looked_at(tmp_path / "out", halves=entry)
    capsys.readouterr()
    assert looked_at(tmp_path / "out", halves=entry) == first
    assert "halves: label maps as counted before" in capsys.readouterr().err
    assert len(calls) == 1
    Image.fromarray(halves(0, 0)).save(tmp_path / "set/annotations/training/train0.png")
    assert looked_at(tmp_path / "out", halves=entry) != first
    (tmp_path / "out/halves/data.json").write_text("{")  # damaged
    looked_at(tmp_path / "out", halves=entry)
    assert len(calls) == 3


def test_two_benchmarks_and_another_probe_share_the_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, count = [], LabelSurvey.count
    monkeypatch.setattr(LabelSurvey, "count", lambda self: calls.append(1) or count(self))
    entry = labels(tmp_path / "set")
    looked_at(tmp_path / "out", one=entry, two=entry | {"dropout": 0.1})
    looked_at(tmp_path / "out", one=entry | {"probe": PROBE | {"steps": 3}})
    assert len(calls) == 1
    assert (tmp_path / "out/two/data.json").is_file()


def test_a_fatal_finding_names_the_benchmark_and_how_to_overrule_it(tmp_path: Path) -> None:
    masks = {"train": [halves(0, 255)], "test": [halves(0, 255)]}
    entry = labels(tmp_path / "set", masks)
    with pytest.raises(DataError) as caught:
        looked_at(tmp_path / "out", binary=entry)
    message = str(caught.value)
    assert message.startswith("benchmarks.binary:\n  - all labelled pixels of train")
    assert message.endswith("To measure all the same: accepted_data=[binary]")


def test_accepted_data_give_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = {"train": [halves(0, 255)], "test": [halves(0, 255)]}
    looked_at(binary=labels(tmp_path / "set", masks), accepted=["binary"])
    assert "warning: benchmarks.binary: all labelled pixels" in capsys.readouterr().err


def test_a_warning_is_repeated_from_kept_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = labels(tmp_path / "set", classes=["a", "b", "c"])
    for _ in range(2):
        looked_at(tmp_path / "out", halves=entry)
        assert "warning: benchmarks.halves: no pixel anywhere of 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("test_folder", r"(?s)benchmarks.second: there is no .*validatoin.*expected under"),
        ("mask", r"benchmarks.second: the label map '.*test0.png': expected 0 to 1 or 255, got 9"),
        ("image", r"(?s)benchmarks.second: .*test0.png"),
        (
            "missing",
            r"(?s)benchmarks.second: .*no label map.*annotations/validation/test0.png.*expected",
        ),
    ],
)
def test_a_mistake_in_the_test_split_of_the_second_benchmark_is_found(
    tmp_path: Path, spoil: str, message: str
) -> None:
    first, second = labels(tmp_path / "one"), labels(tmp_path / "two")
    root = tmp_path / "two"
    if spoil == "test_folder":
        second["dataset"]["test"] = ["images/validation", "annotations/validatoin"]
    elif spoil == "mask":
        Image.fromarray(halves(9, 0)).save(root / "annotations/validation/test0.png")
    elif spoil == "image":
        (root / "images/validation/test0.png").write_bytes(b"no image")
    else:
        (root / "annotations/validation/test0.png").unlink()
    with pytest.raises(DataError, match=message):
        looked_at(first=first, second=second)


def test_depth_is_judged_by_the_range_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)benchmarks.rooms:.*did you mean dataset.unit=1 "):
        looked_at(rooms=depth(tmp_path / "set"))
    assert looked_at(rooms=depth(tmp_path / "set", unit=1.0))["rooms"]["files"] == 4


def test_an_empty_npy_is_a_message(tmp_path: Path) -> None:
    entry = depth(tmp_path / "set", unit=1.0)
    (tmp_path / "set/test/depth/0.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"test/depth/0.npy"):
        looked_at(rooms=entry)


def test_arrays_without_values_are_a_message(tmp_path: Path) -> None:
    entry = depth(tmp_path / "set", unit=1.0)
    np.save(tmp_path / "set/test/depth/0.npy", np.zeros((0, 0)))
    with pytest.raises(DataError, match=r"test/depth/0.npy': no values"):
        looked_at(rooms=entry)


def test_an_empty_file_is_a_message(tmp_path: Path) -> None:
    entry = labels(tmp_path / "set")
    (tmp_path / "set/images/validation/test0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/validation/test0.png' is an empty file"):
        looked_at(halves=entry)


class OwnConfig(BenchmarkConfig):
    files: tuple[Path, ...] = ()


class Own(Benchmark):
    """A user's benchmark, which says nothing of its data but their paths."""

    Config = OwnConfig

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        raise NotImplementedError


def test_the_paths_of_a_users_own_benchmark_are_its_data(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    paths = [tmp_path / "deep/one.txt", tmp_path / "two.txt"]
    for path in paths:
        path.write_text("a")
    files = [str(tmp_path / "deep"), str(paths[1]), str(tmp_path / "absent")]
    entry = {"kind": "tests.test_benchmarks_examine:Own", "files": files}
    first = looked_at(own=entry)["own"]
    assert first["files"] == 2
    paths[0].write_text("b")
    assert looked_at(own=entry)["own"]["contents"] != first["contents"]


def test_a_benchmark_without_files_has_no_record() -> None:
    entry = {"kind": "segmentation", "dataset": {"kind": "embedded"}, "probe": PROBE}
    assert looked_at(drawn=entry, own={"kind": "tests.doubles:Ramp"}) == {
        "drawn": None,
        "own": None,
    }


@pytest.mark.parametrize(
    "changes, wrong",
    [({}, True), ({"short_side": 6}, True), ({"size": [8, 8]}, False), ({"crop": [4, 4]}, False)],
)
def test_training_images_of_several_sizes_are_found_before_the_probe(
    tmp_path: Path, changes: dict[str, Any], wrong: bool
) -> None:
    mixed = [halves(0, 1), np.tile(halves(0, 1), (2, 1))]
    entry = labels(tmp_path / "set", GOOD | {"train": mixed}) | {"input": changes}
    if not wrong:
        looked_at(halves=entry)
        return
    message = r"training images have 2 sizes \(\d+ x \d+, .* set input.size or input.crop"
    with pytest.raises(DataError, match=message):
        looked_at(halves=entry)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input": {"crop": [13, 4]}}, r"input.crop: \[13, 4\] px, but a training image has \(12"),
        ({"input": {"window": {"rows": [0, 13], "columns": [0, 4]}}}, "input.window: a training"),
        ({"counted": {"rows": [0, 13], "columns": [0, 4]}}, "counted: a test image' has 12 x 16"),
    ],
)
def test_windows_and_crops_beyond_an_image_are_found_before_the_probe(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    entry = depth(tmp_path / "set", unit=1.0)
    looked_at(rooms=entry)
    with pytest.raises(DataError, match=message):
        looked_at(rooms=entry | changes)


def test_ranks_above_0_get_the_record_or_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: ({"a": {"files": 2}}, ""))
    assert examine({}, tmp_path) == {"a": {"files": 2}}
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: ({}, "no such folder"))
    with pytest.raises(DataError, match="no such folder"):
        examine({}, tmp_path)
