"""Expands the shards of a recipe: paths, globs, brace ranges, folders and URLs."""

import glob
import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from data.errors import DataError, similar_path
from data.image_files import is_hidden, warn_once
from data.manifest import MANIFEST, read_manifest
from data.text import shown

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
_URL = re.compile(r"^(?:pipe|[A-Za-z][A-Za-z0-9+.-]*(?=://)|file)[:]")


def is_url(shard: str) -> bool:
    """Whether a shard is given by a URL (`https://`, `pipe:`, ...), not by a local path."""
    return bool(_URL.match(shard))


def is_tar(path: Path) -> bool:
    """Whether a file is a tar by its name, and not hidden."""
    return path.suffix.lower() == ".tar" and not is_hidden(path.name)


def tar_files(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted; warns of compressed ones, which are no shards.

    Raises:
        DataError: the folder lacks a shard that its manifest lists.
    """
    names = sorted(folder.iterdir())
    found = [path for path in names if is_tar(path)]
    if found:
        _refuse_missing(folder, {path.name for path in found})
    compressed = [path.name for path in names if _COMPRESSED.search(path.name)]
    if found and compressed:
        warn_once(folder, f"left out {_unpack(compressed)}")
    return found


def _refuse_missing(folder: Path, found: Collection[str]) -> None:
    listed: list[str] = []
    with suppress(DataError):  # not ours; the index says so
        listed = [shard["name"] for shard in (read_manifest(folder) or {"shards": []})["shards"]]
    missing = sorted(set(listed) - set(found))
    if missing:
        raise DataError(
            f"'{shown(folder)}' lacks '{shown(missing[0])}' ({len(missing)} of {len(listed)} "
            f"shards of its {MANIFEST}); copy it again, or name the shards to use"
        )


def _unpack(compressed: Sequence[str]) -> str:
    more = ", ..." if len(compressed) > 1 else ""
    return (
        f"{len(compressed)} compressed archives ('{shown(compressed[0])}'{more}); shards are plain "
        "tars: unpack them, as with gunzip"
    )


def list_shards(patterns: Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Expands the patterns of a source, in the given order; the matches of each are sorted.

    Args:
        patterns: paths, globs, brace ranges, folders of `*.tar`, or URLs (with brace ranges).
        allow_pipe: whether `pipe:` URLs, which are shell commands, are allowed.

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
    """The same string for two spellings of one path."""
    return shard if is_url(shard) else os.path.abspath(shard)


def _local(name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        matches = [str(path) for path in tar_files(path)]
        if not matches:
            names = sorted(each.name for each in path.iterdir() if not is_hidden(each.name))
            compressed = [each for each in names if _COMPRESSED.search(each)]
            others = f", but {_unpack(compressed)}" if compressed else ""
            if names and not compressed:
                others = f"; it holds '{shown(names[0])}'"
            raise DataError(
                f"data.sources.shards: the folder '{shown(name)}' holds no *.tar file{others}"
            )
        return matches
    if path.exists():
        return [str(path)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise DataError(f"data.sources.shards: nothing matches '{name}'{similar_path(path)}")
    return matches


def unique_names(shards: Sequence[str]) -> list[str]:
    """Unique names of shards: the last components of their paths, equally many, as few as possible.

    Keys and states hold names instead of paths, so that a dataset can move to another folder.

    Raises:
        DataError: a shard belongs to two sources.
    """
    parts = [_identity(shard).split("/") for shard in shards]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    double = next(s for i, s in enumerate(shards) if parts[i] in parts[:i])
    raise DataError(
        f"data.sources: the shard '{double}' belongs to two sources; list it once and raise "
        "the weight of its source"
    )
