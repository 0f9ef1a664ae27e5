"""The files that describe a run in its folder, and the check that a recipe can resume it.

recipe.yaml         the resolved recipe
versions.json       packages, Python, machine and git commit
STATUS.json         running, preempted, done or failed
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
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from data.files import write_text
from distill.runtime import distributed
from distill.runtime.config import dump_yaml, load_yaml
from distill.runtime.errors import RecipeError

Status = Literal["running", "preempted", "done", "failed"]

_PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch", "webdataset", "featsharp-distill")
# Sections and keys that may change when a run is resumed, beside all micro-batch sizes.
RESUMABLE_SECTIONS = {"benchmarks", "checkpoint", "tracking", "evaluation"}
RESUMABLE_KEYS = {
    "run": {"dir", "steps", "watchdog_s"},
    "engine": {"zero_stage"},  # checkpoints are resharded
    "targets": {"placement"},
}


def make_run_folder(folder: Path) -> None:
    """Makes the folder if it does not exist; every rank may call this.

    Raises:
        RecipeError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"run.dir: {folder} cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise RecipeError(f"run.dir: {folder} cannot be written to")


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


def open_run_folder(folder: Path, recipe: dict[str, Any]) -> None:
    """Writes recipe and versions to the run's folder, on rank 0.

    Raises:
        RecipeError: the folder contains a run of another recipe; names the first difference.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        found = difference(_comparable(load_yaml(path)), _comparable(recipe))
        if found:
            raise RecipeError(
                f"run.dir: {folder} already holds a run of another recipe ({found}); "
                "choose another run.dir, or remove the folder"
            )
    for leftover in folder.glob(".meeting-*"):  # of processes that were killed
        if leftover.stat().st_mtime < time.time() - 3600:
            leftover.unlink(missing_ok=True)
    write_text(path, dump_yaml(recipe))
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


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in recipe.items() if key not in RESUMABLE_SECTIONS}
    for section, keys in RESUMABLE_KEYS.items():
        kept[section] = {k: v for k, v in recipe.get(section, {}).items() if k not in keys}
    return {key: _without_micro_batches(value) for key, value in kept.items()}


def _without_micro_batches(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "micro_batch_size"}
        return {k: _without_micro_batches(v) for k, v in kept.items()}
    return [_without_micro_batches(v) for v in value] if isinstance(value, list) else value


def difference(old: Any, new: Any, path: str = "") -> str:
    """Describes the first difference between two trees; an empty string if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            place = f"{path}.{key}" if path else str(key)
            found = difference(old.get(key), new.get(key), place)
            if found:
                return found
        return ""
    return "" if old == new else f"{path}: {old!r} there, {new!r} here"
