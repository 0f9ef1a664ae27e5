"""Checkpoints are whole or absent."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.runtime import checkpoint
from distill.runtime.checkpoint import (
    find_checkpoint,
    find_checkpoints,
    read_manifest,
    restore_latest,
    save_checkpoint,
)
from distill.runtime.command import command
from distill.runtime.errors import CheckpointError, RecipeError
from tests.ranks import run_on_ranks

# Where the calls are looked up at which tests make a checkpoint fail.
STOPS_IN = {"mkdir": Path, "fsync": os, "publish": checkpoint}


def _write(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part/a.bin").write_bytes(b"a" * 100)
    (folder / "b.bin").write_bytes(b"b" * 50)


def _save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, _write, {"colour": "blue"}, keep=keep)


def test_the_manifest_lists_every_file_and_the_callers_facts(tmp_path: Path) -> None:
    manifest = read_manifest(_save(tmp_path, 7))
    assert manifest["files"] == {"b.bin": 50, "part/a.bin": 100}
    assert (manifest["step"], manifest["world_size"], manifest["colour"]) == (7, 1, "blue")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):
        _save(tmp_path, step, keep=3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003", "step-00000010"]


@pytest.mark.parametrize("name", ["b.bin", "part/a.bin", "MANIFEST.json"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(tmp_path: Path, name: str) -> None:
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000001"]


def test_a_failed_write_leaves_the_earlier_ones(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _write(folder)
        raise OSError(28, "No space left on device")

    _save(tmp_path, 1)
    complaint = r"step-00000002: could not be written \(rank 0: .*No space.*resumes from the newest"
    with pytest.raises(CheckpointError, match=complaint):
        save_checkpoint(tmp_path, 2, fail, {}, keep=2)
    assert os.listdir(tmp_path) == ["step-00000001"]
    _save(tmp_path, 2)
    assert next(path.name for path in find_checkpoints(tmp_path)) == "step-00000002"


def _fail_on_rank_0(root: str, function: str) -> str:
    """What each rank says when rank 0 alone, which makes and seals the folder, cannot."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    setattr(STOPS_IN[function], function, fail)
    try:
        save_checkpoint(Path(root), 1, lambda folder: None, {}, keep=2)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.process
@pytest.mark.parametrize("function", ["mkdir", "fsync", "publish"])
def test_what_rank_0_cannot_write_is_said_on_every_rank(tmp_path: Path, function: str) -> None:
    said = run_on_ranks(2, _fail_on_rank_0, str(tmp_path), function, timeout_s=60)
    assert said[0] == said[1]
    assert "step-00000001: could not be written (rank 0: OSError: [Errno 28] No space" in said[0]


def test_a_command_whose_checkpoint_fails_prints_one_message_and_ends_with_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @command
    def main() -> None:
        raise CheckpointError("run/checkpoints/step-00000002: could not be written")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: run/checkpoints/step-00000002: could not be written\n"
    )


def test_a_runs_folder_means_its_newest_whole_checkpoint_and_says_which(
    tmp_path: Path, said: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (_save(tmp_path / "checkpoints", step) for step in (7, 9))
    with caplog.at_level(logging.INFO, "distill"):
        assert find_checkpoint(tmp_path) == new
    assert caplog.messages == [f"{tmp_path}: took step-00000009, the newest of 2 checkpoints"]
    assert said() == []  # no warning: this is what anybody expects
    assert find_checkpoint(old) == old
    assert said() == []
    (new / "b.bin").write_bytes(b"")
    assert find_checkpoint(tmp_path) == old
    assert said() == [f"{tmp_path}: took step-00000007; step-00000009 is newer, but incomplete"]
    with pytest.raises(RecipeError, match="step-00000009: the checkpoint is incomplete; give"):
        find_checkpoint(new)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no complete checkpoint in .*checkpoints; train first"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("function", ["publish", "fsync"])
def test_a_kill_before_the_name_is_given_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    _save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    monkeypatch.setattr(STOPS_IN[function], function, kill)
    with pytest.raises(Killed):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000001"]
    assert restore_latest(tmp_path, lambda folder: None) == tmp_path / "step-00000001"
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


def test_restoring_falls_back_to_the_one_that_can_be_read_and_says_so(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    tried = []

    def read(folder: Path) -> None:
        tried.append(folder.name)
        if folder.name == "step-00000002":
            raise RuntimeError("damaged")

    assert restore_latest(tmp_path, read) == tmp_path / "step-00000001"
    assert tried == ["step-00000002", "step-00000001"]
    (line,) = said()
    assert line.startswith(f"goes on from {tmp_path / 'step-00000001'}; newer checkpoints fail: ")
    assert "step-00000002: could not be read (" in line
    assert "damaged" in line


def test_a_run_whose_checkpoints_cannot_be_read_does_not_start_over(tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def fail(folder: Path) -> None:
        raise ValueError("written by 2 ranks")

    with pytest.raises(RuntimeError, match="no checkpoint can be read:\n.*written by 2 ranks"):
        restore_latest(tmp_path, fail)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert restore_latest(tmp_path / "absent", lambda folder: None) is None


def test_a_whole_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    before = (_save(tmp_path, 1) / "MANIFEST.json").stat().st_mtime_ns
    assert (_save(tmp_path, 1) / "MANIFEST.json").stat().st_mtime_ns == before
