"""This process among its parents and signals: clean stops, no orphans, no silent hangs."""

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, SIGUSR1, or its launcher's death.

    A handler that saved at once could wait for ever for peers that do not save, so the handlers
    only set a flag, which the training loop shares among the ranks after every step.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = _launcher_of_parent()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        orphaned = self._launcher is not None and _parent_of(os.getppid()) != self._launcher
        return self._signalled or orphaned


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Spares large imports the garbage collector, which would walk all their objects many times.

    That is a quarter of the time that timm takes to import. What is alive at the end stays, as
    modules do: no later collection walks it either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def die_with_launcher() -> None:
    """Has the kernel kill this process when the launcher that started it is killed (Linux).

    A process that was not started by a launcher is left alone: it may outlive its shell.
    """
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def arm_watchdog(seconds: float) -> None:
    """Ends the process with every thread's trace unless armed again within `seconds`."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def disarm_watchdog() -> None:
    """Calls the watchdog off."""
    faulthandler.cancel_dump_traceback_later()


def _launcher_of_parent() -> int | None:
    """The `deepspeed` process above DeepSpeed's per-node launcher; None under anything else.

    Killing `deepspeed` leaves its launcher and the ranks alive, and they would never know.
    """
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            return _parent_of(os.getppid())
    return None


def _parent_of(process: int) -> int | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])
