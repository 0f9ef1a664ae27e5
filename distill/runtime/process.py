"""Signals, the launcher's death and hangs: stops a process cleanly, or ends it."""

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
    """True once this process was asked to stop by SIGTERM, SIGUSR1 or its launcher's death.

    The signal handlers only set a flag, which the training loop shares among the ranks after every
    step. A handler that saved immediately could wait for ever for ranks that do not save.
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
    """Disables the garbage collector during large imports, which it slows down.

    It takes a quarter of the time of importing timm. The objects alive at the end, such as modules,
    are excluded from later collections too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def die_with_launcher() -> None:
    """Makes the kernel kill this process when its launcher is killed (Linux).

    Does nothing without a launcher: such a process may outlive its shell.
    """
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_limit_s: float | None = None  # of the innermost `watchdog` block


@contextlib.contextmanager
def watchdog(seconds: float | None) -> Iterator[None]:
    """Ends the process, with every thread's trace, if the block hangs.

    The block hangs if it neither ends nor calls `reset_watchdog` for `seconds`. However it ends,
    the limit of the block around it starts anew; there is none outside of all blocks.

    Args:
        seconds: the limit; None sets none, for work of unknown length.
    """
    global _limit_s
    outer, _limit_s = _limit_s, seconds
    try:
        reset_watchdog()
        yield
    finally:
        _limit_s = outer
        reset_watchdog()


def reset_watchdog() -> None:
    """Starts the limit of the innermost `watchdog` block anew, where there is one."""
    if _limit_s is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(_limit_s, exit=True)


def _launcher_of_parent() -> int | None:
    """The `deepspeed` process that started DeepSpeed's per-node launcher; None without one.

    Killing `deepspeed` does not stop that launcher and its ranks.
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
