"""Requests to stop, by SIGTERM, SIGUSR1 or the launcher's death, and how long work ends then.

A command listens to them in `listening`. Its work ends in one of two ways, always with code 0:

- `interruptible` work keeps nothing but what is on disk already: teachers load, kernels compile,
  shards are indexed, ranks wait, benchmarks run. It ends at once, wherever it is, by `Stopped`. The
  other ranks hear of it from the process group's store and end too, whatever they do.
- `agreed_steps` are work that all ranks take together and that keeps what is done: it ends between
  two steps, the same on all ranks; a step that takes longer is given up. The training loop ends
  between two steps too, by its own collective.

Elsewhere, as while a checkpoint is written, a request waits for the next of the two.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

from distill.runtime import distributed
from distill.runtime.process import launcher_of_parent, parent_of

_T = TypeVar("_T")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY_S = 1.0
_AT_ONCE, _PATIENCE_S = 0.0, 20.0  # SLURM kills 30 s after it has asked
_GRACE_S = 10.0  # for a main thread that hangs in a collective or in a library's own code
_OTHERS_S = 5.0  # for the other ranks to have heard of it: rank 0 may host the store


class Stopped(BaseException):
    """The process was asked to stop, and nothing more is to be done.

    No `Exception`, so that it passes what catches errors, as KeyboardInterrupt does.
    """


class StopRequest:
    """True once this process was asked to stop; see `listening`.

    Attributes:
        last_words: called before a process is ended whose main thread hangs.
    """

    def __init__(self) -> None:
        self.last_words: Callable[[], object] = lambda: None
        self._asked_at: float | None = None
        self._patience: float | None = None  # for which a request waits for a step; None for any
        self._ends_at: float | None = None  # once interruptible work has ended, of any rank
        self._left = False
        self._launcher = launcher_of_parent()
        self._process = os.getpid()

    def __bool__(self) -> bool:
        orphaned = self._launcher is not None and parent_of(os.getppid()) != self._launcher
        return self._asked_at is not None or orphaned

    @property
    def ending(self) -> bool:
        """Whether interruptible work has ended, here or on another rank."""
        return self._ends_at is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: raises Stopped in interruptible work."""
        self._asked_at = self._asked_at or time.monotonic()
        if self._patience == _AT_ONCE and os.getpid() == self._process:  # not in a worker's fork
            self._end()

    def _end(self) -> NoReturn:
        self._ends_at = self._ends_at or time.monotonic() + _GRACE_S
        self.leave()

    def leave(self) -> NoReturn:
        """Raises Stopped; what is kept and cleaned up then is not interrupted again."""
        self._left, self._patience = True, None
        raise Stopped

    @contextlib.contextmanager
    def mode(self, patience: float) -> Iterator[None]:
        """How many seconds requests wait during the block; an earlier one counts too."""
        before, self._patience = self._patience, patience
        try:
            if patience == _AT_ONCE and self:
                self._end()
            yield
        finally:
            self._patience = None if self._left or self.ending else before

    def _is_due(self) -> bool:
        """Whether a request has waited for as long as the present work lets it."""
        asked_at, patience = self._asked_at, self._patience
        if asked_at is None or patience is None:
            return False
        return time.monotonic() - asked_at >= patience

    def watch(self, signals: socket.socket, over: threading.Event) -> None:
        """The body of a thread: passes requests on to other ranks, and from them to this one.

        Args:
            signals: gets the number of each signal at once, also while the main thread hangs.
            over: set when the main thread listens no longer.
        """
        while not over.is_set():
            ready, _, _ = select.select([signals], [], [], _LOOK_EVERY_S)
            came = bool(ready) and not set(signals.recv(4096)).isdisjoint(_SIGNALS)
            if came or self:
                self._asked_at = self._asked_at or time.monotonic()
            if not self.ending and (self._is_due() or distributed.stop_announced()):
                self._ends_at = time.monotonic() + _GRACE_S
                self._patience = _AT_ONCE
                os.kill(self._process, signal.SIGTERM)  # wakes the main thread
            if self._ends_at is not None:
                distributed.announce_stop()
                if time.monotonic() > self._ends_at:
                    self.last_words()
                    say_stopped()
                    distributed.await_announcements(_OTHERS_S)
                    os._exit(0)


_current: StopRequest | None = None


def say_stopped() -> None:
    """Prints on rank 0 that a command ends on request."""
    if distributed.rank() == 0:
        text = "stopped on request; what is complete is kept, and the same command goes on"
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """Notes requests to stop during the block; signals have their former effect afterwards."""
    global _current
    request, over = StopRequest(), threading.Event()
    told, wake = socket.socketpair()
    for end in (told, wake):
        end.setblocking(False)
    handlers = [signal.signal(number, request.note) for number in _SIGNALS]
    waker = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=request.watch, args=(told, over), daemon=True)
    thread.start()
    before, _current = _current, request
    try:
        yield request
    except (Exception, Stopped) as error:
        if not request.ending:
            raise
        distributed.announce_stop()
        distributed.await_announcements(_OTHERS_S)
        raise Stopped from error  # such as that of a collective that other ranks have left
    finally:
        _current = before
        signal.set_wakeup_fd(waker)
        for number, handler in zip(_SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
        over.set()
        wake.send(b"\0")
        thread.join()
        told.close()
        wake.close()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Work that a request to stop ends at once; without effect where no command listens.

    Raises:
        Stopped: this process or another rank was asked to stop, before or during the block.
    """
    if _current is None:
        yield
        return
    with _current.mode(_AT_ONCE):
        yield


def agreed_steps(steps: Iterable[_T]) -> Iterator[_T]:
    """The steps of work that all ranks take together, until any rank was asked to stop.

    The first one, in which kernels compile, is interruptible; the others come to their end. Every
    rank must take as many steps.

    Raises:
        Stopped: on all ranks, before the same step.
    """
    if _current is None:
        yield from steps
        return
    steps = iter(steps)
    with _current.mode(_AT_ONCE):
        for step in steps:
            yield step
            break
    with _current.mode(_PATIENCE_S):
        for step in steps:
            if distributed.any_rank(bool(_current)):
                _current.leave()
            yield step


os.register_at_fork(after_in_child=lambda: _leave_in_child())


def _leave_in_child() -> None:
    """A signal to a worker of data is no request to this process, whose socket it would share."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
