"""Rank and device of this process, the process group, and collectives.

Only RANK, LOCAL_RANK and WORLD_SIZE are read, so that `deepspeed`, `torchrun`, `srun` (see `slurm`)
and plain `python` can start the same program. In a single process the collectives do nothing.
"""

import hashlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from distill.runtime import timing

_STOPPING, _FAILURE, _SPEAKER = "ranks_stopping", "failure", "speaker"  # keys of the store
_timeout: timedelta | None = None  # of collectives, once connected
_store: dist.Store | None = None  # where several ranks met
_announced = False


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def connect(timeout_s: float, folder: Path) -> None:
    """Joins the process group.

    On one machine the processes meet in a file, so that simultaneous runs need no different ports.
    On several machines they meet at MASTER_ADDR and MASTER_PORT, which the launcher sets.

    Args:
        timeout_s: seconds after which a collective fails if a rank does not join it.
        folder: of that file, the same for all processes of the run.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it in any case
    global _timeout, _store
    _timeout = timedelta(seconds=timeout_s)
    options: dict[str, Any] = {"timeout": _timeout}
    if world_size() == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        store: Any = _meet(folder)
        prefixed = dist.PrefixStore("collectives", store)
        _store = store.clone()  # of its own: a client that waits is locked
        options |= {"store": prefixed, "rank": rank(), "world_size": world_size()}
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **options)


def _meet(folder: Path) -> dist.Store:
    """The store that all ranks share."""
    if _on_one_machine():
        return dist.FileStore(str(folder / _meeting_place()), world_size())
    store, _, _ = next(dist.rendezvous("env://", rank(), world_size()))
    return store


def _on_one_machine() -> bool:
    """Whether `deepspeed` (LOCAL_SIZE) or torchrun started all processes on this machine."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return local == str(world_size())


def _meeting_place() -> str:
    """A file name that is common to the processes of one launcher, and different for others."""
    launcher = psutil.Process(os.getppid())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # `torchrun --max-restarts`
    return f".meeting-{launcher.pid}-{launcher.create_time():.2f}-{attempt}"


def disconnect(folder: Path) -> None:
    """Waits for all processes, leaves the process group and deletes the file of `connect`."""
    global _store
    barrier()
    dist.destroy_process_group()
    _store = None
    # By every rank: a store that is destroyed after rank 0 has deleted the file makes it again.
    (folder / _meeting_place()).unlink(missing_ok=True)


@contextmanager
def connected(timeout_s: float, folder: Path) -> Iterator[None]:
    """Joins the process group for the block, if there are several processes; see `connect`."""
    if world_size() == 1:
        yield
        return
    connect(timeout_s, folder)
    yield  # after an exception do not wait for the others, which run into their timeout
    disconnect(folder)


def time_limit() -> timedelta | None:
    """For which a collective waits for its ranks; None before `connect`."""
    return _timeout


def announce_stop() -> None:
    """Tells all ranks, once, that this one was asked to stop."""
    global _announced
    if _store is not None and not _announced:
        _announced = True
        with suppress(RuntimeError):  # the rank that hosts the store is gone
            _store.add(_STOPPING, 1)


def stop_announced() -> bool:
    """Whether any rank has called `announce_stop`; other than collectives, from any thread."""
    try:
        return _store is not None and bool(_store.check([_STOPPING]))
    except RuntimeError:  # the rank that hosts the store is gone
        return False


def await_announcements(timeout_s: float) -> None:
    """Waits until all ranks have called `announce_stop`, at most for `timeout_s` seconds."""
    until = time.monotonic() + timeout_s
    with suppress(RuntimeError):
        while _store is not None and _store.add(_STOPPING, 0) < world_size():
            if time.monotonic() > until:
                return
            time.sleep(0.05)


def announce_failure(message: str) -> None:
    """Tells all ranks why this one ends, before the launcher asks them to stop."""
    with suppress(RuntimeError):
        if _store is not None and not _store.check([_FAILURE]):
            _store.set(_FAILURE, f"rank {rank()}: {message}")


def speaks() -> bool:
    """Whether this rank is to print an error that ends it: the first to ask, once connected.

    Before that rank 0 is, as all have the same errors then.
    """
    if _store is None:
        return rank() == 0
    try:
        return int(_store.add(_SPEAKER, 1)) == 1
    except RuntimeError:  # the rank that hosts the store is gone, and has spoken
        return False


def announced_failure() -> str | None:
    """What the first rank that failed has announced; None if none has."""
    with suppress(RuntimeError):
        if _store is not None and _store.check([_FAILURE]):
            return bytes(_store.get(_FAILURE)).decode(errors="replace")
    return None


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        index = device().index  # otherwise NCCL guesses the GPU, with a warning
        dist.barrier(device_ids=None if index is None else [index])


@contextmanager
def first_on_its_node() -> Iterator[None]:
    """Runs the block on the first process of each machine, then on the others; all must call this.

    So the others find large files that the first has read or downloaded in memory or on disk.
    """
    hosts = gather_objects(socket.gethostname())
    leads = hosts.index(hosts[rank()]) == rank()
    if not leads:
        barrier()
    try:
        yield
    finally:  # also after an error, so that the others do not wait
        if leads:
            barrier()


def all_reduce(values: Tensor, op: str = "sum") -> Tensor:
    """Reduces a tensor over the processes, in place; `op` is sum, max or min."""
    if dist.is_initialized() and world_size() > 1:
        with timing.timed(timing.WAITING):
            dist.all_reduce(values, op=getattr(dist.ReduceOp, op.upper()))
    return values


class Peers(NamedTuple):
    """The ranks of one partition, which train the same arms, and this rank's place among them.

    torch's process group is None if this rank is alone.
    """

    group: Any = None
    size: int = 1
    place: int = 0


def peers_among(partitions: Sequence[range]) -> Peers:
    """This rank's peers among disjoint ranges of ranks; every rank must call this."""
    found = Peers()
    for ranks in partitions:
        group = dist.new_group(list(ranks), _timeout) if len(ranks) > 1 else None
        if rank() in ranks:
            found = Peers(group, len(ranks), rank() - ranks.start)
    return found


def all_gather(own: Tensor, peers: Peers) -> Tensor:
    """Concatenates a tensor (n,) of each peer, in their order: (peers * n,)."""
    if peers.group is None:
        return own
    whole = own.new_empty(peers.size * len(own))
    with timing.timed(timing.WAITING):
        dist.all_gather_into_tensor(whole, own, group=peers.group)
    return whole


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any process; every process must call this."""
    return bool(all_reduce(torch.tensor(float(flag), device=device()), "max") > 0)


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value on every process."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of the ranks, on every process."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class AnyRankFailed(RuntimeError):
    """An action failed on some ranks; the message lists these ranks and their errors."""


def on_all_ranks(action: Callable[[], None], *, ranks: int | None = None) -> None:
    """Runs an action on the first `ranks` processes, or on all.

    Raises:
        AnyRankFailed: on every process, if it failed on one, so that none waits for another.
    """
    failure = None
    if ranks is None or rank() < ranks:
        try:
            action()
        except AnyRankFailed as error:  # the other ranks have it too
            failure = str(error)
        except Exception as error:
            failure = f"rank {rank()}: {type(error).__name__}: {error}"
    failures = [f for f in gather_objects(failure) if f is not None]
    if failures:
        raise AnyRankFailed("; ".join(dict.fromkeys(failures)))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, such as (seed, purpose, rank, step), in order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_default_generators(*parts: int | str) -> None:
    """Seeds torch's default generators, on every device, and Python's with `derive_seed`."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)


def derived_generator(purpose: str) -> torch.Generator:
    """A generator on the CPU that is seeded from the last seed of torch's default generator.

    Drawing from it does not change the state of the default generator.
    """
    return torch.Generator().manual_seed(derive_seed(torch.initial_seed(), purpose))
