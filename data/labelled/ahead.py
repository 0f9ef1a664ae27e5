"""Reads files a little ahead of their use, so that whoever computes does not wait for a decoder."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_THREADS = 8
_AHEAD = 32  # items that are being read or wait for their use


def read_ahead(read: Callable[[_Item], _Read], items: Iterable[_Item]) -> Iterator[_Read]:
    """Yields `read(item)` of every item, in their order, from threads that run ahead.

    Args:
        read: whatever releases the interpreter while it works: decoding and resizing do. It runs
            in several threads at once.
        items: consumed no further than what is being read.

    Raises:
        Exception: whatever `read` raised, in the place of its item.
    """
    waiting: deque[Future[_Read]] = deque()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
