"""srun's variables in torch's words."""

import os

import pytest
import torch

from distill.runtime import slurm

TASK = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "13",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,2",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process of srun, without a launcher's variables; what it sets is undone."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    return monkeypatch


def adopted() -> dict[str, str]:
    slurm.adopt()
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_a_task_of_srun_finds_its_place(task: pytest.MonkeyPatch) -> None:
    assert adopted() == {
        "RANK": "9",
        "WORLD_SIZE": "13",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + 4242 * 7 % 20_000),
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("login,gpu[1-2]", "login"),
        ("gpu[007,9-12],big1", "gpu007"),
        ("rack[2-3]n[05-08]", "rack2n05"),
        ("a-b[1-2].site.org", "a-b1.site.org"),
    ],
)
def test_rank_0_is_on_the_first_node_of_the_list(nodes: str, first: str) -> None:
    assert slurm.translated(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_two_steps_of_a_job_meet_at_different_ports() -> None:
    ports = {slurm.translated(TASK | {"SLURM_STEP_ID": str(i)})["MASTER_PORT"] for i in range(5)}
    assert len(ports) == 5


def test_what_the_user_has_set_stays(task: pytest.MonkeyPatch) -> None:
    task.setenv("MASTER_PORT", "4711")
    assert adopted()["MASTER_PORT"] == "4711"


def test_another_launcher_under_srun_has_the_last_word(task: pytest.MonkeyPatch) -> None:
    task.setenv("RANK", "0")
    assert adopted() == {"RANK": "0"}


@pytest.mark.parametrize("tasks", ["1", None], ids=["one task", "sbatch without srun"])
def test_a_single_process_stays_alone(tasks: str | None, task: pytest.MonkeyPatch) -> None:
    if tasks is None:
        task.delenv("SLURM_STEP_NUM_TASKS")
    else:
        task.setenv("SLURM_STEP_NUM_TASKS", tasks)
    assert adopted() == {}


def test_a_task_that_sees_only_its_own_gpu_takes_it(task: pytest.MonkeyPatch) -> None:
    task.setattr(torch.cuda, "device_count", lambda: 1)
    assert adopted()["LOCAL_RANK"] == "0"
