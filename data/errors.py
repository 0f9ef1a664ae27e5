"""The exception that stands for a user's mistake: shown as a message, never as a traceback."""


class DataError(ValueError):
    """Images, shards or their configuration cannot be used as asked."""
