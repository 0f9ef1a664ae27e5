"""The exception for a user's mistake about teachers: shown without a traceback."""


class TeacherError(ValueError):
    """A teacher, its weights or its upsampler cannot be used as requested."""
