"""The exception that stands for a user's mistake: shown as a message, never as a traceback."""


class StudentError(ValueError):
    """A student, its weights or its input was asked for in a way that cannot work."""
