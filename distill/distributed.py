"""Where this process stands among the others, and the few collectives the project needs.

Only RANK, LOCAL_RANK and WORLD_SIZE are read, so `deepspeed`, `torchrun`, `srun` with these
variables and plain `python` all start the same program. In one process everything is a no-op.
"""

import hashlib
import os
import random
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def connect(timeout_s: float) -> None:
    """Joins the process group; one process alone makes a group of itself through a file-less store.

    Args:
        timeout_s: seconds after which a collective that a peer never joins gives up.
    """
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, whoever made the group
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def disconnect() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values: Tensor, op: str = "sum") -> Tensor:
    """Reduces a tensor over the processes, in place; `op` is sum, max or min."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(values, op=getattr(dist.ReduceOp, op.upper()))
    return values


def broadcast_object(value: Any) -> Any:
    """Gives every process rank 0's value."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in the order of the ranks, on every process."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and on their order: (seed, purpose, rank, step)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_default_generators(*parts: int | str) -> None:
    """Seeds torch's default generators, on every device, and Python's from `derive_seed`."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
