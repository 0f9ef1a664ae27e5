"""The files that describe a run in its folder, and the check that a recipe can resume it.

The rules of the check are in `distill.runtime.resuming`.

recipe.yaml         the resolved recipe
versions.json       packages, Python, machine and git commit
STATUS.json         running, preempted, done or failed
changes.jsonl       what changed when the run went on by `run.resume=anyway`
metrics.jsonl       a line of metrics every few steps (`distill.runtime.tracking`)
checkpoints/        see `distill.runtime.checkpoint`
index/              the index of the shards (`data.index`)
pictures/           PCA pictures of features
"""

import contextlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from data.files import write_text
from distill.runtime import distributed
from distill.runtime.config import dump_yaml, load_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.resuming import Change, Contents, content_of, deciding, note, refuse, unlike

Status = Literal["running", "preempted", "done", "failed"]

_PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch", "webdataset", "featsharp-distill")


def make_folder(folder: Path, key: str) -> None:
    """Makes a folder for results if it does not exist; every rank may call this.

    Args:
        folder: to make.
        key: of the recipe that names it, for messages.

    Raises:
        RecipeError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{key}: {folder} cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"{key}: {folder} cannot be written to")


def require_shared(folder: Path) -> None:
    """Checks that all machines see the same folder; every rank must call this.

    Raises:
        RecipeError: on every rank; lists the machines that see another folder.
    """
    host = socket.gethostname()
    first, name = distributed.broadcast_object((host, f".seen-{host}-{os.getpid()}"))
    if distributed.rank() == 0:
        (folder / name).touch()
    distributed.barrier()
    unseen = distributed.gather_objects(None if (folder / name).exists() else host)
    if distributed.rank() == 0:
        (folder / name).unlink()
    blind = sorted({host for host in unseen if host is not None})
    if blind:
        raise RecipeError(
            f"run.dir: {folder} is another folder on {', '.join(blind)} than on {first}; it must "
            "be on a file system that all machines share, under one path"
        )


def open_run_folder(folder: Path, recipe: dict[str, Any], *, anyway: bool = False) -> list[Change]:
    """Compares the recipe with that of the run in the folder, if any; called on rank 0.

    Recipe and versions are written now, or by `confirm_run_folder` if contents decide.

    Args:
        folder: of the run.
        recipe: the resolved one.
        anyway: accepts changes that decide the result.

    Returns:
        The changes that decide it, or may by contents that are not read yet.

    Raises:
        RecipeError: the folder contains a run of another recipe; names the differences.
    """
    path = folder / "recipe.yaml"
    found = deciding(load_yaml(path), recipe) if path.exists() else []
    certain = [change for change in found if content_of(change) is None]
    if certain and not anyway:
        refuse(folder, certain)
    for leftover in folder.glob(".meeting-*"):  # of processes that were killed
        if leftover.stat().st_mtime < time.time() - 3600:
            leftover.unlink(missing_ok=True)
    if not found:
        _describe(folder, recipe)
    return found


def confirm_run_folder(
    folder: Path,
    recipe: dict[str, Any],
    found: Sequence[Change],
    contents: tuple[Contents, Contents],
    *,
    step: int,
    anyway: bool = False,
) -> None:
    """Compares contents, once they are read, notes what changed and writes the recipe; on rank 0.

    Args:
        folder: of the run.
        recipe: the resolved one.
        found: what `open_run_folder` returned.
        contents: of the newest checkpoint, empty without one, and of this run.
        step: of that checkpoint.
        anyway: accepts changes that decide the result.

    Raises:
        RecipeError: the run goes on with other contents; names the differences.
    """
    by_content = [change for change in found if content_of(change) is not None]
    other = unlike(by_content, *contents)
    if other and not anyway:
        refuse(folder, other)
    certain = [change for change in found if change not in by_content]
    if certain or other:
        note(folder, step, [*certain, *other])
    if found:
        _describe(folder, recipe)


def _describe(folder: Path, recipe: dict[str, Any]) -> None:
    write_text(folder / "recipe.yaml", dump_yaml(recipe))
    write_text(folder / "versions.json", json.dumps(versions(), indent=1))


def write_status(folder: Path, status: Status, **facts: Any) -> None:
    """Writes `STATUS.json` on rank 0, because an exit code cannot tell done from preempted.

    A status that cannot be written is left out: a full disk has ended the run with its own error.
    """
    if distributed.rank() == 0:
        text = json.dumps({"status": status, "pid": os.getpid(), **facts}, indent=1)
        with contextlib.suppress(OSError):
            write_text(folder / "STATUS.json", text)


def versions() -> dict[str, str]:
    """The versions of packages and Python, the machine and the git commit."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["git"] = _git_commit()
    return found


def _git_commit() -> str:
    home = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(home), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
