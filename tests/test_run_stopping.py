"""Runs that are asked to stop before their first step is done: they end with 0, on every rank."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from distill.runtime.checkpoint import find_checkpoints
from tests.forks import Fork
from tests.test_run_nodes import start_on_two_machines
from tests.tiny_run import (
    DEADLOCK_S,
    _variables_of,
    environment,
    plain_command,
    wait_for_metrics,
    write_recipe,
    write_troubled,
)

pytestmark = pytest.mark.process

# On the last rank, within a function of the run.
HANGS = """
import traceback

def trouble():
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    within = [frame.name for frame in traceback.extract_stack()]
    if int(os.environ.get("RANK", "0")) == last and "WITHIN" in within:
        Path("hangs").touch()
        time.sleep(600)
"""
IN_STATISTICS, IN_THE_FIRST_STEP = "_estimate", "_step"


def test_a_scheduler_signals_the_workers_of_data_too(tmp_path: Path) -> None:
    data = {"workers": 2}
    recipe = write_recipe(tmp_path, data=data, checkpoint={"every": 10_000})
    command = plain_command(recipe, "run.steps=10000", "schedule.kind=constant")
    fork = Fork(command, tmp_path, environment())
    wait_for_metrics(tmp_path / "run", fork)
    family = psutil.Process(fork.pid).children(recursive=True)
    assert len(family) >= 2
    for process in [*family, psutil.Process(fork.pid)]:
        process.send_signal(signal.SIGTERM)
    assert fork.wait(DEADLOCK_S) == 0, fork.outputs()
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["status"] == "preempted"
    assert len(find_checkpoints(tmp_path / "run/checkpoints")) == 1
    _, alive = psutil.wait_procs(family, 60)
    assert not alive


def codes_after_asking(forks: list[Fork], asked: int, folder: Path) -> list[int]:
    """The exit codes after one of them is asked to stop while another one hangs."""
    deadline = time.monotonic() + DEADLOCK_S
    try:
        while not (folder / "hangs").exists():
            assert time.monotonic() < deadline
            assert all(fork.poll() is None for fork in forks), forks[-1].outputs()
            time.sleep(0.05)
        forks[asked].send_signal(signal.SIGTERM)
        return [fork.wait(DEADLOCK_S) for fork in forks]
    finally:
        for fork in forks:
            fork.kill()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("within", [IN_STATISTICS, IN_THE_FIRST_STEP])
def test_one_rank_is_asked_and_all_end(ranks: int, within: str, tmp_path: Path) -> None:
    """The other ranks wait in a collective for the one that hangs."""
    command = plain_command(write_troubled(tmp_path, HANGS.replace("WITHIN", within)))
    variables = _variables_of(ranks)
    forks = [Fork(command, tmp_path, environment() | own) for own in variables]
    codes = codes_after_asking(forks, -1, tmp_path)
    errors = "".join(fork.outputs()[1] for fork in forks)
    assert codes == [0] * ranks, errors
    assert "Traceback" not in errors
    assert errors.count("stopped on request") == 1
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["status"] == "preempted"
    assert not find_checkpoints(tmp_path / "run/checkpoints")


def test_the_machine_that_hosts_the_store_is_asked_and_both_end(tmp_path: Path) -> None:
    """It waits in a collective meanwhile."""
    recipe = write_troubled(tmp_path, HANGS.replace("WITHIN", IN_STATISTICS))
    forks = start_on_two_machines(recipe)
    codes = codes_after_asking(forks, 0, tmp_path)
    assert codes == [0, 0], [fork.outputs() for fork in forks]
    assert json.loads((tmp_path / "run/STATUS.json").read_text())["status"] == "preempted"
