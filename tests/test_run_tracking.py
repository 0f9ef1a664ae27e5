"""What a run shows of itself: wandb's copy of the numbers, and pictures that change nothing."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from distill.runtime.tracking import read_metrics
from tests.tiny_run import assert_same_weights, plain_command, run, tiny_recipe, write_recipe

pytestmark = pytest.mark.process

STEPS = 4
SHORT = (f"run.steps={STEPS}", "checkpoint.every=4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The section `data` of all runs here."""
    return tiny_recipe(tmp_path_factory.mktemp("data"))["data"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, shards: dict) -> Path:
    """A folder with a run that draws and logs to wandb, whose home folder is `home`."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "home").mkdir()
    tracking = {"every": 1, "wandb": "offline", "pictures_every": 2}
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


def test_wandb_offline_writes_into_the_runs_folder_only(tracked: Path) -> None:
    assert not [path for path in (tracked / "home").rglob("*") if "wandb" in path.name]
    outside = [path for path in tracked.rglob("*wandb*") if tracked / "run" not in path.parents]
    assert outside == []


def test_pictures_are_images_of_four_rows_and_a_column_each_for_image_teacher_student(
    tracked: Path,
) -> None:
    pictures = sorted((tracked / "run/pictures").iterdir())
    assert [path.name for path in pictures] == ["step-00000002.png", "step-00000004.png"]
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.size == (3 * 198 - 6, 22 + 4 * 198 - 6)
            colours = picture.crop((198, 22, 390, 214)).getcolors(192 * 192)
            assert colours is not None
            assert len(colours) > 1  # a teacher's map, and no empty panel


def test_neither_pictures_nor_wandb_change_the_weights(
    tracked: Path, shards: dict, tmp_path: Path
) -> None:
    done = run(plain_command(write_recipe(tmp_path, data=shards), *SHORT), tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "run", tracked / "run", STEPS)
    assert not (tmp_path / "run/pictures").exists()
    assert not (tmp_path / "run/wandb").exists()
