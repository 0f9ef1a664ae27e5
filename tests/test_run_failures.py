"""How a run ends that hangs, or that finds no room for its checkpoint."""

import json
import subprocess
from pathlib import Path

import pytest

from distill.runtime.checkpoint import find_checkpoints
from distill.runtime.tracking import read_metrics
from tests.tiny_run import (
    DEADLOCK_S,
    environment,
    launcher_command,
    plain_command,
    run,
    write_recipe,
    write_troubled,
)

pytestmark = pytest.mark.process

# The watchdog's time runs out at once where the run hangs, and nowhere else.
HANGS = """
import faulthandler

later = faulthandler.dump_traceback_later
armed = []
faulthandler.dump_traceback_later = lambda seconds, **options: armed.append((seconds, options))

def trouble():
    if Path("run/metrics.jsonl").exists():
        (seconds, options) = armed[-1]
        assert seconds == 12
        later(0.1, **options)
        time.sleep(600)
"""
# The kernel refuses rank 0 to write beyond 20 kB of any file, as it would on a full disk.
FILLS_THE_DISK = """
def trouble():
    if os.environ.get("RANK", "0") == "0" and Path("full").exists():
        if not Path("run/checkpoints/step-00000002").exists():
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
"""


def test_a_step_that_hangs_ends_the_run_with_every_threads_trace(tmp_path: Path) -> None:
    done = run(
        plain_command(
            write_troubled(tmp_path, HANGS, checkpoint={"every": 2}), "run.watchdog_s=12"
        ),
        tmp_path,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:00.1" in done.stderr
    trace = done.stderr[done.stderr.index("Timeout") :]
    for frame in ("in trouble", "in extract", "in _step", "in _train"):
        assert frame in trace, trace
    assert "most recent call first" in trace


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_with_one_message_and_it_goes_on_later(
    ranks: int, tmp_path: Path
) -> None:
    recipe = write_troubled(tmp_path, FILLS_THE_DISK, checkpoint={"every": 2})
    command = plain_command(recipe, "run.steps=6")
    (tmp_path / "full").touch()
    done = run(command, tmp_path, ranks=ranks)
    folder = tmp_path / "run/checkpoints"
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    place = folder / "step-00000004"
    assert errors[0].startswith(f"error: {place}: could not be written (rank 0: ")
    assert errors[0].endswith("the same command resumes from the newest")
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    status = json.loads((tmp_path / "run/STATUS.json").read_text())
    assert status["status"] == "failed"
    assert "step-00000004: could not be written" in status["error"]

    (tmp_path / "full").unlink()
    done = run(command, tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {folder / 'step-00000002'}" in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert find_checkpoints(folder)[0].name == "step-00000006"


def test_under_the_launcher_a_mistake_is_the_last_thing_on_the_screen(tmp_path: Path) -> None:
    """Below the launcher's own log of how it ended all ranks."""
    recipe = write_recipe(tmp_path)
    done = subprocess.run(
        launcher_command(recipe, "data.sources=[{shards: nowhere}]", ranks=2),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLOCK_S,
        check=False,
    )
    assert done.returncode == 2
    *_, log, empty, last = done.stdout.splitlines()
    assert "exits with return code = 2" in log
    assert empty == ""
    assert last.startswith("error: ")
    assert "nowhere" in last
    assert done.stdout.count("error: ") == 1
