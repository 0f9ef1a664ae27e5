"""User errors about images and shards: shown as one message, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class DataError(ValueError):
    """Images, shards or their configuration cannot be used as asked."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the allowed word closest to `word`, or nothing."""
    match = get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def similar_path(path: Path) -> str:
    """The hint for a missing path: the closest name beside it."""
    return did_you_mean(path.name, [each.name for each in path.parent.glob("*")])
