"""What ends a command with one readable message and no traceback: mostly a user's mistakes."""

from data.errors import DataError
from student.errors import StudentError
from teachers.errors import TeacherError


class RecipeError(ValueError):
    """A recipe, an override or a checkpoint cannot be used as given."""


class CheckpointError(OSError):
    """A checkpoint could not be written; nobody's mistake, and no defect that a trace explains."""


USER_ERRORS = (RecipeError, DataError, TeacherError, StudentError)
