"""What SLURM's `srun` says of a process, in the words of torch's launchers.

`srun` starts every process itself and names them by variables of its own; `torchrun` and
`deepspeed` use RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which we and DeepSpeed
read. (SLURM's manual, srun, "OUTPUT ENVIRONMENT VARIABLES".)
"""

import os
import re
from collections.abc import Mapping

import torch

_PORTS = range(10_000, 30_000)  # below those that systems give to clients


def adopt() -> None:
    """Sets torch's variables where `srun` has started this process and several others.

    What is set already stays: another launcher's, or the user's MASTER_ADDR and MASTER_PORT.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    for name, value in translated(os.environ).items():
        os.environ.setdefault(name, value)
    if torch.cuda.device_count() == 1:  # `srun --gpus-per-task=1` shows each its own as number 0
        os.environ["LOCAL_RANK"] = "0"


def translated(variables: Mapping[str, str]) -> dict[str, str]:
    """torch's variables, from those of a task of `srun`.

    The port follows from job and step, so that the steps of a machine have one each.
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
    """`gpu[007-009,12],big1` to gpu007, where the process of rank 0 is."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert found is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", found[0])
