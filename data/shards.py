"""Which shards a recipe names: globs, braces, folders and URLs to a list of paths."""

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError

_URL = re.compile(r"^(?:pipe|[A-Za-z][A-Za-z0-9+.-]*(?=://)|file)[:]")


def is_url(shard: str) -> bool:
    """Whether a shard is opened by scheme (`https://`, `pipe:`, ...) and not as a local file."""
    return bool(_URL.match(shard))


def list_shards(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Expands what a source names, in the order given; each pattern's own matches are sorted.

    Args:
        patterns: paths, globs, brace ranges, folders of `*.tar`, or URLs (braces expand too).
        allow_pipe: whether `pipe:` URLs, which are shell commands, may stand in the list.

    Raises:
        DataError: a pattern matches nothing or has unbalanced braces, a shard is named twice, or a
            pipe is not allowed.
    """
    found: list[str] = []
    for pattern in patterns:
        for name in _expand(pattern):
            if name.lower().startswith("pipe:") and not allow_pipe:
                raise DataError(
                    f"data.sources.shards: '{name}' is a shell command; "
                    "set data.allow_pipe=true if you trust it"
                )
            found.extend([name] if is_url(name) else _local(name))
    seen: set[str] = set()
    for shard in found:
        if (identity := _identity(shard)) in seen:
            raise DataError(f"data.sources.shards: '{shard}' is named twice")
        seen.add(identity)
    return found


def _expand(pattern: str) -> list[str]:
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"data.sources.shards: '{pattern}': {error}") from error


def _identity(shard: str) -> str:
    """The same for two ways to write one path."""
    return shard if is_url(shard) else os.path.abspath(shard)


def _local(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        matches = sorted(str(p) for p in path.glob("*.tar"))
        if not matches:
            raise DataError(f"data.sources.shards: the folder '{name}' holds no *.tar file")
        return matches
    if path.exists():
        return [str(path)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" (did you mean '{path.parent / close[0]}'?)" if close else ""
        raise DataError(f"data.sources.shards: nothing matches '{name}'{hint}")
    return matches


def unique_names(shards: Sequence[str]) -> list[str]:
    """The shortest trailing parts of the paths, of equal length, that tell all shards apart.

    Names, not paths, stand in keys and states, so that a data set can move to another folder.

    Raises:
        DataError: one shard belongs to two sources.
    """
    parts = [_identity(shard).split("/") for shard in shards]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    double = next(s for i, s in enumerate(shards) if parts[i] in parts[:i])
    raise DataError(f"data.sources: the shard '{double}' belongs to two sources; raise its weight")
