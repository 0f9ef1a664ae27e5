"""Turns a user's mistake in a command into one message and an exit code."""

import functools
import os
import sys
from collections.abc import Callable

from data.errors import DataError
from distill.runtime import slurm
from distill.runtime.errors import USER_ERRORS, CheckpointError

MISTAKE = 2  # exit code of a user's mistake, as argparse uses it


FAILURE = 1  # of anything else


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`: what a trace would not explain is printed in one message.

    A user's mistake ends the process with code 2, a checkpoint that cannot be written with 1.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        slurm.adopt()
        try:
            main()
        except USER_ERRORS as error:
            # A recipe's mistake is the same on every rank; bad data may be one rank's alone.
            if os.environ.get("RANK", "0") == "0" or isinstance(error, DataError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(MISTAKE)
        except CheckpointError as error:  # it names every rank's failure, on every rank
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(FAILURE)

    return wrapped
