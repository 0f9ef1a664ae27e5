"""Turns user errors in a command into one message and an exit code."""

import functools
import os
import sys
import time
from collections.abc import Callable

from data.text import print_anything, printable
from distill.runtime import distributed, slurm
from distill.runtime.errors import FAILURES, USER_ERRORS
from distill.runtime.heap import keep_freed_memory
from distill.runtime.last_message import print_last
from distill.runtime.stopping import Stopped, say_stopped

MISTAKE = 2  # exit code of a user error, as in argparse
FAILURE = 1  # exit code of any other error
_BEHIND_S = 2.0  # the launcher ends rank 0 when another rank has ended: not before it has printed


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main` so that expected errors print one message without a traceback.

    A user error ends the process with code 2, a checkpoint that cannot be written, an upload that
    fails or a file that does not return what its student does with code 1, a request to stop with
    code 0.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        slurm.adopt()
        if distributed.device().type == "cpu":
            keep_freed_memory()
        print_anything()
        try:
            main()
        except (*USER_ERRORS, *FAILURES) as error:
            if distributed.speaks():  # most are the same on every rank
                print_last(f"error: {printable(error)}")
            else:
                time.sleep(_BEHIND_S)
            sys.exit(FAILURE if isinstance(error, FAILURES) else MISTAKE)
        except Stopped:
            _end_on_request()

    return wrapped


def _end_on_request() -> None:
    say_stopped()
    if distributed.world_size() > 1:  # at an orderly exit NCCL would wait for the other ranks
        sys.stdout.flush()
        os._exit(0)
    sys.exit(0)
