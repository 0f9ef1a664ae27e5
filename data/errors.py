"""The exception that stands for a user's mistake in data."""


class DataError(ValueError):
    """Images, shards or their description cannot be used as given."""
