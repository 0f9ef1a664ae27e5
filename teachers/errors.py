"""The exception that stands for a user's mistake: shown as a message, never as a traceback."""


class TeacherError(ValueError):
    """A teacher, its weights or its upsampler was asked for in a way that cannot work."""
