"""Words for a user: the hint for a misspelt word, and what is said once in a process."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

_LOG = logging.getLogger("teachers")
_said: set[str] = set()
_hushed: list[bool] = []


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the allowed word closest to `word`, or nothing."""
    match = get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def say_once(message: str, key: str | None = None) -> None:
    """Warns of a choice, an assumption or an oddity; one message of a key, or text, a process."""
    if (key or message) not in _said:
        _said.add(key or message)
        if not any(_hushed):
            _LOG.warning("%s", message)


@contextmanager
def hushed(active: bool) -> Iterator[None]:
    """Says nothing within the block if `active`: on ranks of which another one says the same."""
    _hushed.append(active)
    try:
        yield
    finally:
        _hushed.pop()


def took(where: str, chosen: str, candidates: Iterable[str], why: str = "") -> None:
    """Says which of several candidates was taken; nothing where there is one only."""
    names = list(dict.fromkeys(candidates))
    if len(names) > 1:
        say_once(f"{where}: took {chosen} of [{', '.join(names)}]{f', {why}' if why else ''}")
