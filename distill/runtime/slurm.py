"""Translates the environment variables of SLURM's `srun` into those of torch's launchers.

`srun` starts every process itself and describes it in its own variables. This project and DeepSpeed
read those of `torchrun` and `deepspeed`: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
(SLURM's manual, srun, "OUTPUT ENVIRONMENT VARIABLES".)
"""

import os
import re
from collections.abc import Mapping

import torch

_PORTS = range(10_000, 30_000)  # below the ephemeral ports


def adopt() -> None:
    """Sets torch's variables if `srun` started this process among several.

    Variables that are set already are kept: those of another launcher, or a user's MASTER_ADDR and
    MASTER_PORT.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for name, value in translated(os.environ).items():
        os.environ.setdefault(name, value)
    if torch.cuda.device_count() == 1:  # as with `srun --gpus-per-task=1`
        os.environ["LOCAL_RANK"] = "0"


def translated(variables: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for the variables of a task of `srun`.

    The port depends on job and step, so that different steps on a machine have different ports.
    """
    node = int(variables["SLURM_NODEID"])
    step = int(variables["SLURM_JOB_ID"]) * 7 + int(variables["SLURM_STEP_ID"])
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_by_node(variables["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": _first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_PORTS[step % len(_PORTS)]),
    }


def _tasks_by_node(text: str) -> list[int]:
    """`2(x3),1` to [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        counts += [int(number)] * int(times or 1)
    return counts


def _first_host(nodes: str) -> str:
    """`gpu[007-009,12],big1` to gpu007, the host of rank 0."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert found is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])
