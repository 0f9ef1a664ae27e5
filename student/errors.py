"""The exception for mistakes of the user: commands print its message without a traceback."""


class StudentError(ValueError):
    """The configuration, the weights or the input of a student is invalid."""
