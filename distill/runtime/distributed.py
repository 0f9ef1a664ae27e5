"""Where this process stands among the others, and the few collectives the project needs.

Only RANK, LOCAL_RANK and WORLD_SIZE are read, so `deepspeed`, `torchrun`, `srun` (see `slurm`)
and plain `python` all start the same program. In one process everything is a no-op.
"""

import hashlib
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from distill.runtime import timing


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


def connect(timeout_s: float, folder: Path) -> None:
    """Joins the process group.

    On one machine the processes meet in a file, so that runs side by side need no port of their
    own; on several they meet at MASTER_ADDR and MASTER_PORT, which the launcher sets.

    Args:
        timeout_s: seconds after which a collective that a peer never joins gives up.
        folder: where the file lies, the same for all processes of the run.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, whoever made the group
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if world_size() == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif _on_one_machine():
        path = folder / _meeting_place()
        store = dist.FileStore(str(path), world_size())
        options |= {"store": store, "rank": rank(), "world_size": world_size()}
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **options)


def _on_one_machine() -> bool:
    """Whether all processes were started here: by `deepspeed` (LOCAL_SIZE) or by torchrun."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return local == str(world_size())


def _meeting_place() -> str:
    """A file name that the processes of one launcher share, and no other launcher's, ever."""
    launcher = psutil.Process(os.getppid())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # `torchrun --max-restarts`
    return f".meeting-{launcher.pid}-{launcher.create_time():.2f}-{attempt}"


def disconnect(folder: Path) -> None:
    """Leaves the process group, once all do, and removes the file they met in."""
    barrier()
    dist.destroy_process_group()
    if rank() == 0:
        (folder / _meeting_place()).unlink(missing_ok=True)


@contextmanager
def connected(timeout_s: float, folder: Path) -> Iterator[None]:
    """Joins the other processes, where there are any, for as long as the block runs.

    Args:
        timeout_s: see `connect`.
        folder: see `connect`.
    """
    if world_size() == 1:
        yield
        return
    connect(timeout_s, folder)
    yield  # a process that failed does not wait for the others: they give up by themselves
    disconnect(folder)


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        index = device().index  # NCCL guesses the GPU, with a warning, unless it is told
        dist.barrier(device_ids=None if index is None else [index])


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """The first process of each machine runs the block, then its others do; all must call this.

    What the first has read of large files or has downloaded, the others find in memory or on disk.
    """
    hosts = gather_objects(socket.gethostname())
    leads = hosts.index(hosts[rank()]) == rank()
    if not leads:
        barrier()
    try:
        yield
    finally:  # a process that fails says so itself
        if leads:
            barrier()


def all_reduce(values: Tensor, op: str = "sum") -> Tensor:
    """Reduces a tensor over the processes, in place; `op` is sum, max or min."""
    if dist.is_initialized() and world_size() > 1:
        with timing.timed(timing.WAITING):
            dist.all_reduce(values, op=getattr(dist.ReduceOp, op.upper()))
    return values


class Peers(NamedTuple):
    """Ranks that do the same work in step.

    Attributes:
        group: what torch calls them; None where this rank is alone.
        size: how many there are.
        place: of this rank among them.
    """

    group: Any = None
    size: int = 1
    place: int = 0


def peers_among(parts: Sequence[range]) -> Peers:
    """This rank's peers, of parts that no two ranks share; every rank must call this."""
    found = Peers()
    for part in parts:
        group = dist.new_group(list(part)) if len(part) > 1 else None
        if rank() in part:
            found = Peers(group, len(part), rank() - part.start)
    return found


def all_gather(own: Tensor, peers: Peers) -> Tensor:
    """(n,) of each of the peers, one after the other, (peers * n,)."""
    if peers.group is None:
        return own
    whole = own.new_empty(peers.size * len(own))
    with timing.timed(timing.WAITING):
        dist.all_gather_into_tensor(whole, own, group=peers.group)
    return whole


def any_rank(flag: bool) -> bool:
    """Whether any process has the flag set; every process must call this."""
    return bool(all_reduce(torch.tensor(float(flag), device=device()), "max") > 0)


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


class AnyRankFailed(RuntimeError):
    """An action failed on some ranks; the message names them and what went wrong."""


def on_all_ranks(action: Callable[[], None], *, ranks: int | None = None) -> None:
    """Runs an action on the first `ranks` processes, or on all.

    Raises:
        AnyRankFailed: on every process, where it failed on one, so that none waits for another.
    """
    failure = None
    if ranks is None or rank() < ranks:
        try:
            action()
        except AnyRankFailed as error:  # which the other ranks have too
            failure = str(error)
        except Exception as error:
            failure = f"rank {rank()}: {type(error).__name__}: {error}"
    failures = [f for f in gather_objects(failure) if f is not None]
    if failures:
        raise AnyRankFailed("; ".join(dict.fromkeys(failures)))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, and on their order: (seed, purpose, rank, step)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_default_generators(*parts: int | str) -> None:
    """Seeds torch's default generators, on every device, and Python's from `derive_seed`."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)


def derived_generator(purpose: str) -> torch.Generator:
    """A generator on the CPU that follows from the last seed of torch's default one.

    What draws from it changes nothing for those who draw from the default one.
    """
    return torch.Generator().manual_seed(derive_seed(torch.initial_seed(), purpose))
