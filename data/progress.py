"""Progress of long work: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")
_LINE_EVERY_S = 10.0


def track(items: Sequence[_T], what: str) -> Iterator[_T]:
    """Yields the items and reports progress on stderr; a log gets a line every ten seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(items, what, console=Console(stderr=True), transient=True)
        return
    begin = printed = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if time.monotonic() - printed > _LINE_EVERY_S:
            printed = time.monotonic()
            print(
                f"{what}: {done + 1} of {len(items)}, {printed - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
