"""Where the time of the steps goes: images, each teacher, student, communication, optimiser.

One clock a process, which the loop starts; what runs inside a part adds to it, without knowing the
loop. A part's time leaves out the parts inside it, so that all of them sum to the whole. On a GPU
the marks are events in its stream: nothing waits for them, and what they measure is the device's
time, in which waiting for images or for other ranks shows as what it is.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

OTHER = "other"  # what no part covers
WAITING = "communication"  # the part in which a rank waits for slower ones


class Clock:
    """Seconds of each part since the last restart."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured."""
        self._marks: list[tuple[str, Any]] = []  # what begins, and when
        self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block for a part, and no longer for the one around it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    def read(self) -> dict[str, float]:
        """Seconds of every part that was open; the device finishes its work first."""
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
    """A clock that every `part` of this process adds to while the block runs."""
    global _clock
    before, _clock = _clock, Clock()
    try:
        yield _clock
    finally:
        _clock = before


@contextmanager
def part(name: str) -> Iterator[None]:
    """Counts the block for a part of the step, where a clock runs."""
    if _clock is None:
        yield
        return
    with _clock.part(name):
        yield


def shares(ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """What the clocks of all ranks read, as metrics.

    Returns:
        `time/<part>`: its share of the ranks' time, all of which sum to 1. Where there are several
        ranks, `slowest_rank`: the one that works longest, its waiting for the others left out; and
        `slowest_rank_work`: its work over the mean rank's.
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
