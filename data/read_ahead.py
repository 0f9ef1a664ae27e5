"""Loading files in threads ahead of their use, so that a GPU does not wait for a decoder."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Loaded = TypeVar("_Loaded")


def read_ahead(
    load: Callable[[_Item], _Loaded], items: Iterable[_Item], *, ahead: int = 32
) -> Generator[_Loaded]:
    """Yields `load(item)` of every item, in order, and raises what `load` raised in its place.

    Closing the generator waits for the loads that have begun and drops the others.

    Args:
        load: called in several threads at once. Decoding and resizing release Python's lock.
        items: consumed as they are loaded.
        ahead: largest number of items that are loaded before they are asked for.
    """
    waiting: deque[Future[_Loaded]] = deque()
    pool = ThreadPoolExecutor(min(ahead, _own_cores()))
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _own_cores() -> int:
    """This process's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # torchrun and `deepspeed` name the number of processes on this machine differently.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, (cores or 1) // int(processes))
