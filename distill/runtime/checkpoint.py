"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-00000100`. It is written as `.tmp-…`, by all ranks, and gets its name
only after a manifest with every file's size has reached the disk, so that a kill at any moment
leaves the earlier ones. DeepSpeed's own `latest` file, which rank 0 writes before its peers are
done, is not used. What a checkpoint holds is the caller's business, except the manifest.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import publish, sync, write_text
from distill.runtime import distributed
from distill.runtime.errors import CheckpointError, RecipeError

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any], *, keep: int
) -> Path:
    """Writes a checkpoint on all ranks, then removes the oldest ones beyond `keep`.

    Args:
        root: the folder of all checkpoints.
        step: optimiser steps done.
        write: called by every rank with the folder to write into; the folder exists.
        facts: goes into the manifest, which `read_manifest` returns.
        keep: whole checkpoints to keep, the newest ones.

    Returns:
        The folder, under its final name; it is not written again where it is already whole.

    Raises:
        CheckpointError: a file could not be written on some rank, as on a full disk; the earlier
            checkpoints are untouched, and what was written of this one is removed.
    """
    final, partial = root / checkpoint_name(step), root / f".tmp-{checkpoint_name(step)}"
    if distributed.broadcast_object(is_whole(final)):
        return final
    facts = {**facts, "step": step, "world_size": distributed.world_size()}
    try:
        distributed.on_all_ranks(lambda: _begin(partial, final), ranks=1)
        distributed.on_all_ranks(lambda: write(partial))
        distributed.on_all_ranks(lambda: _finish(partial, final, facts, keep), ranks=1)
    except distributed.AnyRankFailed as error:
        # Said always, because torch hides a full disk behind "unexpected pos".
        free = distributed.broadcast_object(_free_megabytes(root))
        if distributed.rank() == 0:  # a full disk then has room for the run's last words
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written ({error}; {free} MB are free there); the earlier "
            "checkpoints are whole, and the same command goes on from the newest"
        ) from None
    return final


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest whole one of a run's folder.

    Raises:
        RecipeError: there is no whole checkpoint.
    """
    if is_whole(path):
        return path
    if _NAME.fullmatch(path.absolute().name):
        raise RecipeError(f"{path}: the checkpoint is not whole; give another, or its run")
    found = find_checkpoints(path / "checkpoints")
    if not found:
        raise RecipeError(
            f"{path}: no whole checkpoint in {path / 'checkpoints'}; train first, or give another "
            "run's folder, or one of its checkpoints/step-... folders"
        )
    return found[0]


def find_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, the newest first; folders whose files do not match are passed over."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and is_whole(path)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder has a manifest and every file of it at its full size."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in files.items()
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest: `step`, `world_size`, `files` (path to bytes) and the caller's facts."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def restore_latest(root: Path, read: Callable[[Path], None]) -> Path | None:
    """Restores the newest checkpoint that all ranks can read.

    Args:
        root: the folder of all checkpoints.
        read: called by every rank with a folder; any exception counts as unreadable.

    Returns:
        The folder that was restored; None where there is no checkpoint at all.

    Raises:
        RuntimeError: there are checkpoints, and none of them can be read.
    """
    if distributed.rank() == 0:
        _sweep(root)
    candidates = distributed.broadcast_object([str(p) for p in find_checkpoints(root)])
    failures = []
    for name in candidates:
        try:
            distributed.on_all_ranks(functools.partial(read, Path(name)))
        except distributed.AnyRankFailed as error:
            failures.append(f"{name}: could not be read ({error})")
        else:
            return Path(name)
    if failures:
        raise RuntimeError("no checkpoint can be read:\n  " + "\n  ".join(failures))
    return None


def _begin(partial: Path, final: Path) -> None:
    _remove(partial)
    _remove(final)
    partial.mkdir(parents=True)


def _finish(partial: Path, final: Path, facts: dict[str, Any], keep: int) -> None:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    for path in files:
        sync(path)
    write_text(partial / MANIFEST, json.dumps({**facts, "files": sizes}, indent=1))
    publish(partial, final)
    for old in find_checkpoints(final.parent)[keep:]:
        _remove(old)


def _free_megabytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 10**6


def _remove(folder: Path) -> None:
    """Deletes a folder; under another name first, so that a kill leaves nothing half whole."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name.lstrip('.')}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash)


def _sweep(root: Path) -> None:
    for pattern in (".tmp-*", ".trash-*"):
        for leftover in root.glob(pattern):
            shutil.rmtree(leftover)
