"""Runs on several machines, each a process here: they meet over TCP, lose one, and go on."""

import json
import socket
from pathlib import Path

import pytest

from distill.runtime import distributed
from distill.runtime.checkpoint import checkpoint_name, find_checkpoints, read_manifest
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import require_shared
from distill.runtime.tracking import read_metrics
from tests.forks import Fork
from tests.ranks import run_on_ranks
from tests.tiny_run import DEADLOCK_S, environment, plain_command, wait_for_metrics, write_recipe

pytestmark = pytest.mark.process


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def start_on_two_machines(recipe: Path, *overrides: str) -> list[Fork]:
    """As `srun --nodes 2 --ntasks-per-node 1` does, where both have this machine's name."""
    port = str(free_port())
    forks = []
    for node in ("0", "1"):
        task = {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": node,
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": node,
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "localhost",
            "MASTER_PORT": port,
        }
        command = plain_command(recipe, *overrides)
        forks.append(Fork(command, recipe.parent, environment() | task))
    return forks


def printed_by(forks: list[Fork]) -> str:
    """What they print until they end."""
    try:
        for fork in forks:
            fork.wait(DEADLOCK_S)
    finally:
        for fork in forks:
            fork.kill()
    return "\n".join(text for fork in forks for text in fork.outputs())


def test_a_run_goes_on_after_a_machine_is_lost(tmp_path: Path) -> None:
    recipe, checkpoints = write_recipe(tmp_path), tmp_path / "run/checkpoints"
    first, second = start_on_two_machines(recipe, "checkpoint.every=1", "run.steps=10000")
    while first.poll() is None and not find_checkpoints(checkpoints):
        wait_for_metrics(tmp_path / "run", first)
    second.kill()
    printed = printed_by([first, second])
    assert first.returncode not in (0, -9), printed
    assert _status(tmp_path) == "failed"

    newest = max(int(folder.name[-8:]) for folder in find_checkpoints(checkpoints))
    forks = start_on_two_machines(recipe, "checkpoint.every=1", f"run.steps={newest + 2}")
    printed = printed_by(forks)
    assert [fork.returncode for fork in forks] == [0, 0], printed
    assert _status(tmp_path) == "done"
    assert f"resumed from {checkpoints / checkpoint_name(newest)}" in printed
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, newest + 3))
    assert read_manifest(checkpoints / checkpoint_name(newest + 2))["world_size"] == 2


def _status(folder: Path) -> str:
    return str(json.loads((folder / "run/STATUS.json").read_text())["status"])


def test_processes_that_torchrun_starts_again_meet_in_another_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one still has the addresses of those that were killed."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    names = [distributed._meeting_place()]
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        names.append(distributed._meeting_place())
    assert names[0] == names[1] != names[2]


def noted(path: Path, rename: bool) -> None:
    """Each rank notes that it is in the block, and the first one stays for a while."""
    rank = distributed.rank()
    if rename:  # two machines of two
        socket.gethostname = lambda: f"node{rank // 2}"
    with distributed.first_on_its_node():
        before = {file.name for file in path.iterdir()}
        (path / f"{rank}").touch()
    leader = str(rank // 2 * 2) if rename else "0"
    assert rank in (0, 2 * rename) or leader in before


@pytest.mark.parametrize("rename", [False, True], ids=["one machine", "two machines"])
def test_the_first_process_of_each_machine_reads_before_its_others(
    rename: bool, tmp_path: Path
) -> None:
    run_on_ranks(4, noted, tmp_path, rename)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2", "3"}


def failing() -> str:
    """What a rank says where the first one cannot read, and the others could."""
    with distributed.first_on_its_node():
        if distributed.rank() == 0:
            return "left"
    return "went on"


def test_a_first_process_that_fails_keeps_no_one_waiting() -> None:
    assert run_on_ranks(2, failing) == ["left", "went on"]


def checked(folder: Path, own: bool) -> str:
    if own and distributed.rank() == 1:
        folder = folder / "elsewhere"
    folder.mkdir(exist_ok=True)
    try:
        require_shared(folder)
    except RecipeError as error:
        return str(error)
    return ""


def test_a_run_folder_that_is_not_shared_is_refused_on_every_rank(tmp_path: Path) -> None:
    assert run_on_ranks(2, checked, tmp_path, False) == ["", ""]
    assert not list(tmp_path.iterdir())
    host = socket.gethostname()
    for message in run_on_ranks(2, checked, tmp_path, True):
        assert f"is another folder on {host} than on {host}; it must be on a file" in message
