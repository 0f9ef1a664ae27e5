"""Checkpoints that are complete or absent.

    checkpoints/step-00000100/
        MANIFEST.json           step, world_size, versions, position of the stream, file sizes
        recipe.yaml             the resolved recipe
        engine/                 DeepSpeed's files: weights, and a shard of the optimiser per rank
        average_<rank>.pt       shard of the weights' moving average, or average.pt, all of it
        batch_norms.pt          the average of batch norms' statistics, where there are any
        random_<rank>.pt        states of the default random generators
        student.safetensors     the student to use, with averaged weights (`student.storage`);
                                upsampler.safetensors in a run that trains an upsampler
        statistics/             PHI-S and dispersion of each teacher's features, students only
        objective.pt            state of the loss weighting, students only, where it has one

All ranks write into a folder `.tmp-step-...`. It gets its name when a manifest with the size of
every file is on disk, so that a kill at any moment leaves the earlier checkpoints intact.
DeepSpeed's own `latest` file is not used, because rank 0 writes it before the other ranks are done.
This module writes the manifest; the caller writes the other files.
"""

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import publish, sync, write_text
from distill.runtime import distributed
from distill.runtime.errors import CheckpointError, RecipeError, UnreadableError
from teachers.messages import say_once

log = logging.getLogger("distill")

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any], *, keep: int
) -> Path:
    """Writes a checkpoint on all ranks, then removes the oldest ones beyond `keep`.

    Args:
        root: the folder of all checkpoints.
        step: optimiser steps done.
        write: called by every rank with the existing folder to write into.
        facts: added to the manifest.
        keep: number of checkpoints to keep, the newest ones.

    Returns:
        The folder, under its final name. A complete checkpoint is not written again.

    Raises:
        CheckpointError: a rank could not write a file, for example on a full disk. Earlier
            checkpoints are intact, and the files of this one are deleted.
    """
    final, partial = root / checkpoint_name(step), root / f".tmp-{checkpoint_name(step)}"
    if distributed.broadcast_object(is_complete(final)):
        return final
    facts = {**facts, "step": step, "world_size": distributed.world_size()}
    try:
        distributed.on_all_ranks(lambda: _begin(partial, final), ranks=1)
        distributed.on_all_ranks(lambda: write(partial))
        distributed.on_all_ranks(lambda: _finish(partial, final, facts, keep), ranks=1)
    except distributed.AnyRankFailed as error:
        # Always shown, because torch reports a full disk as "unexpected pos".
        free = distributed.broadcast_object(_free_megabytes(root))
        if distributed.rank() == 0:  # makes room on a full disk, for the status
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written ({error}; {free} MB are free there); the earlier "
            "checkpoints are complete, and the same command resumes from the newest"
        ) from None
    return final


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path: the path itself, or the newest complete one of a run's folder.

    Raises:
        RecipeError: there is no complete checkpoint.
    """
    if is_complete(path):
        return path
    if _NAME.fullmatch(path.absolute().name):
        raise RecipeError(f"{path}: the checkpoint is incomplete; give another one, or its run")
    found = find_checkpoints(path / "checkpoints")
    if not found:
        raise RecipeError(
            f"{path}: no complete checkpoint in {path / 'checkpoints'}; train first, or give "
            "another run's folder or one of its checkpoints/step-... folders"
        )
    if distributed.rank() == 0:
        _say_choice(path, found)
    return found[0]


def _say_choice(run: Path, found: list[Path]) -> None:
    """Says which checkpoint of a run was taken, and which newer ones cannot be."""
    chosen = found[0].name
    newer = [
        path.name
        for path in sorted((run / "checkpoints").iterdir())
        if _NAME.fullmatch(path.name) and path.name > chosen
    ]
    if newer:
        say_once(f"{run}: took {chosen}; {', '.join(newer)} is newer, but incomplete")
    elif len(found) > 1:  # the ordinary case: no warning
        log.info("%s: took %s, the newest of %d checkpoints", run, chosen, len(found))


def find_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, newest first; incomplete ones are skipped."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest and all files of the manifest with their sizes."""
    try:
        files = read_manifest(folder)["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in files.items()
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest: `step`, `world_size`, `files` (path to bytes) and the caller's facts."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def restore_latest(root: Path, read: Callable[[Path], None]) -> Path | None:
    """Restores the newest checkpoint that all ranks can read.

    Args:
        root: the folder of all checkpoints.
        read: called by every rank with a folder; after any exception the next one is tried.

    Returns:
        The folder that was restored; None if there is no checkpoint.

    Raises:
        UnreadableError: there are checkpoints, but none of them can be read.
    """
    if distributed.rank() == 0:
        for leftover in [*root.glob(".tmp-*"), *root.glob(".trash-*")]:
            shutil.rmtree(leftover)
    candidates = distributed.broadcast_object([str(p) for p in find_checkpoints(root)])
    failures = []
    for name in candidates:
        try:
            distributed.on_all_ranks(functools.partial(read, Path(name)))
        except distributed.AnyRankFailed as error:
            failures.append(f"{name}: could not be read ({error})")
        else:
            if failures and distributed.rank() == 0:
                say_once(f"goes on from {name}; newer checkpoints fail: {'; '.join(failures)}")
            return Path(name)
    if failures:
        raise UnreadableError("no checkpoint can be read:\n  " + "\n  ".join(failures))
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
    """Deletes a folder under another name, so that a kill does not leave half a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f".trash-{folder.name.lstrip('.')}")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(folder, trash)
        shutil.rmtree(trash)
