"""Errors that end a command with one message and no traceback."""

from data.errors import DataError
from student.errors import StudentError
from teachers.errors import TeacherError


class RecipeError(ValueError):
    """A recipe, an override or a checkpoint cannot be used as given."""


class CheckpointError(OSError):
    """A checkpoint could not be written, for example because the disk is full."""


class UnreadableError(CheckpointError, RuntimeError):
    """No checkpoint of a run can be read, or fits what is trained."""


class UploadError(OSError):
    """What was to be published could not be: no network, or a server that fails."""


class AgreementError(RuntimeError):
    """An exported file does not return what the student does."""


FAILURES = (AgreementError, CheckpointError, UploadError)
USER_ERRORS = (RecipeError, DataError, TeacherError, StudentError)
