"""What a run shows of itself: trackers' copies of the numbers; pictures change nothing."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from distill.runtime.tracking import read_metrics
from tests.tiny_run import assert_same_weights, plain_command, run, tiny_recipe, write_recipe
from tests.trackers import mlflow_run, mlflow_values, tensorboard_pictures, tensorboard_values

pytestmark = pytest.mark.process

STEPS = 4
SHORT = (f"run.steps={STEPS}", "checkpoint.every=4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The section `data` of all runs here."""
    return tiny_recipe(tmp_path_factory.mktemp("data"))["data"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, shards: dict) -> Path:
    """A folder with a run that draws and logs to all trackers, whose home folder is `home`."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "home").mkdir()
    tracking = {"every": 1, "wandb": "offline", "tensorboard": True, "mlflow": "local"}
    tracking["pictures_every"] = 2
    recipe = write_recipe(folder, data=shards, tracking=tracking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "XDG_CACHE_HOME"):
            patch.delenv(name, raising=False)
        done = run(plain_command(recipe, *SHORT), folder)
    assert done.returncode == 0, done.stderr
    return folder


def _wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: LevelDB's log format behind a header of seven bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # too little of the block for a record's header
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def _wandb_history(folder: Path) -> list[dict[str, object]]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in _wandb_records(path):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or i.nested_key[0]): i.value_json for i in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def test_wandb_offline_holds_the_numbers_of_metrics_jsonl(tracked: Path) -> None:
    metrics = read_metrics(tracked / "run")
    history = _wandb_history(tracked / "run")
    assert [row["_step"] for row in history] == [1, 2, 3, 4]
    for line, row in zip(metrics, history, strict=True):
        assert {key: row[key] for key in line if key != "step"} == {
            key: value for key, value in line.items() if key != "step"
        }
        assert {k for k in row if k[0] != "_"} - line.keys() == (
            set() if line["step"] % 2 else {"features"}
        )


def test_tensorboard_and_mlflow_hold_the_numbers_of_metrics_jsonl(tracked: Path) -> None:
    lines = read_metrics(tracked / "run")
    for found, slash in (
        (tensorboard_values(tracked / "run"), "/"),
        (mlflow_values(tracked / "run"), "."),
    ):
        names = {name for line in lines for name in line if name != "step"}
        assert set(found) == {name.replace("/", slash) for name in names}
        for name in names:
            due = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            came = found[name.replace("/", slash)]
            assert [step for step, _ in came] == [step for step, _ in due]
            assert [value for _, value in came] == pytest.approx([value for _, value in due])
    assert tensorboard_pictures(tracked / "run") == {"features": [2, 4]}
    assert mlflow_run(tracked / "run").info.status == "FINISHED"


def test_trackers_write_into_the_runs_folder_only(tracked: Path) -> None:
    parts = ("wandb", "mlruns", "mlflow", "tfevents", "tensorboard")
    home = [path for path in (tracked / "home").rglob("*") if any(p in path.name for p in parts)]
    assert not home
    outside = [
        path
        for part in parts
        for path in tracked.rglob(f"*{part}*")
        if tracked / "run" not in path.parents
    ]
    assert outside == []


def test_pictures_are_images_of_four_rows_and_a_column_each_for_image_teacher_student(
    tracked: Path,
) -> None:
    pictures = sorted((tracked / "run/pictures").iterdir())
    assert [path.name for path in pictures] == ["step-00000002.png", "step-00000004.png"]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (192 + 24 + 2 * 198 - 6, 2 * 22 + 4 * 198 - 6)
            colours = picture.crop((198, 22, 390, 214)).getcolors(192 * 192)
            assert colours is not None
            assert len(colours) > 1  # a teacher's map, and no empty panel


def test_neither_pictures_nor_trackers_change_the_weights(
    tracked: Path, shards: dict, tmp_path: Path
) -> None:
    done = run(plain_command(write_recipe(tmp_path, data=shards), *SHORT), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "run", tracked / "run", STEPS)
    assert not (tmp_path / "run/pictures").exists()
    for name in ("wandb", "mlruns", "tensorboard"):
        assert not (tmp_path / "run" / name).exists()
