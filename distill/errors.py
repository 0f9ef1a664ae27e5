"""A user's mistakes: one readable message and exit code 2, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable

from data.errors import DataError
from student.errors import StudentError
from teachers.errors import TeacherError

MISTAKE = 2  # exit code of a user's mistake, as argparse uses it


class RecipeError(ValueError):
    """A recipe, an override or a checkpoint cannot be used as given."""


USER_ERRORS = (RecipeError, DataError, TeacherError, StudentError)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's `main`: a user's mistake is printed and ends the process with code 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except USER_ERRORS as error:
            # A recipe's mistake is the same on every rank; bad data may be one rank's alone.
            if os.environ.get("RANK", "0") == "0" or isinstance(error, DataError):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(MISTAKE)

    return wrapped
