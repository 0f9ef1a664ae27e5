"""Measures which share of the steps' time goes to images, teachers, student, optimiser and so on.

A process has one clock, which the loop starts. `with timed(name):` counts a block of code under a
name, wherever the code is. Time in an inner block does not count for the outer one, so that all
times sum to the whole. On a GPU the clock records events in its stream, without waiting for them;
it measures the time of the device, including the time in which the device has nothing to do.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"  # time outside all blocks
WAITING = "communication"  # in which a rank waits for slower ones


class Clock:
    """Seconds under each name since the last restart."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Starts again from zero."""
        self._marks: list[tuple[str, Any]] = []  # the name from a time on
        self._mark()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the block under a name, and not for the block around it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def read(self) -> dict[str, float]:
        """Name to seconds, after waiting for the device."""
        self._mark()
        if torch.cuda.is_available():
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + _between(begin, end)
        return found

    def _mark(self) -> None:
        self._marks.append((self._open[-1] if self._open else OTHER, _now()))


_clock: Clock | None = None


@contextmanager
def measured() -> Iterator[Clock]:
    """Yields a clock for all `timed` blocks of this process while the block runs."""
    global _clock
    before, _clock = _clock, Clock()
    try:
        yield _clock
    finally:
        _clock = before


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Counts the block under a name if a clock is running."""
    if _clock is None:
        yield
        return
    with _clock.timed(name):
        yield


def shares(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics from the clocks of all ranks.

    Returns:
        `time/<name>`: its share of the time of all ranks; the shares sum to 1. With several ranks
        also `slowest_rank`: the rank with the most work, that is time except waiting for others;
        and `slowest_rank_work`: its work divided by the mean over ranks.
    """
    whole = max(sum(sum(one.values()) for one in ranks), 1e-9)
    names = sorted({name for one in ranks for name in one})
    found = {f"time/{n}": sum(one.get(n, 0.0) for one in ranks) / whole for n in names}
    if len(ranks) > 1:
        work = [sum(one.values()) - one.get(WAITING, 0.0) for one in ranks]
        found["slowest_rank"] = float(work.index(max(work)))
        found["slowest_rank_work"] = max(work) * len(work) / max(sum(work), 1e-9)
    return found


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    return float(begin.elapsed_time(end)) / 1000
