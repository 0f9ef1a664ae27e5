"""Prints a message below everything that the launcher of a process still logs.

When a rank ends with an error, `deepspeed` and `torchrun` end the other ranks and log how, twenty
lines and more. The launcher is not ours, and its exit code comes from the rank's. So a process in
the background waits for the launcher's end and prints then.
"""

import os
import select
import sys
from pathlib import Path

_LAUNCHERS = (b"deepspeed.launcher.launch", b"torchrun", b"torch.distributed.run")
_TIMEOUT_S = 60  # the launcher gives the other ranks 30 s to end


def print_last(text: str) -> None:
    """Prints to stderr: after the launcher's log if there is a launcher on this machine."""
    launcher = _launcher()
    sys.stdout.flush()
    if launcher is None:
        print(text, file=sys.stderr, flush=True)
        return
    sys.stderr.flush()
    if os.fork():
        return
    os.setsid()  # so that the launcher, which ends its ranks with all below them, finds it not
    if os.fork() == 0:
        _wait_for(launcher)
        os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))
    os._exit(0)


def _launcher() -> int | None:
    """The process of the launcher that started this one, if it did so on this machine."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return None
    return parent if any(name in command for name in _LAUNCHERS) else None


def _wait_for(process: int) -> None:
    try:
        ended = os.pidfd_open(process)
    except OSError:  # it has ended
        return
    select.select([ended], [], [], _TIMEOUT_S)
