"""The launcher of a process and its death, hangs, and large imports."""

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


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


@contextlib.contextmanager
def watchdog(seconds: float | None) -> Iterator[None]:
    """Ends the process, with every thread's trace, if the block does not end within `seconds`.

    It is a scope: nothing is armed before the block and after it, however it ends. There is one
    timer in a process, so a block inside another one switches the outer limit off for good.

    Args:
        seconds: the limit; None sets none, for work of unknown length.
    """
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def launcher_of_parent() -> int | None:
    """The `deepspeed` process that started DeepSpeed's per-node launcher; None without one.

    Killing `deepspeed` does not stop that launcher and its ranks.
    """
    with contextlib.suppress(OSError):
        if b"deepspeed.launcher.launch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            return parent_of(os.getppid())
    return None


def parent_of(process: int) -> int | None:
    """The parent of a process; None if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])
