"""User errors about images and shards: shown as one message, without a traceback."""

from difflib import get_close_matches
from pathlib import Path


class DataError(ValueError):
    """Images, shards or their configuration cannot be used as asked."""


def similar_path(path: Path) -> str:
    """` (did you mean 'folder/x'?)` with the name beside a missing path that is closest to it."""
    names = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean '{path.parent / close[0]}'?)" if close else ""
