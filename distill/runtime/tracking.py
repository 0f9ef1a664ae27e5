"""Reports metrics of a run: JSON lines, a progress bar or plain lines, and trackers.

Only rank 0 writes.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import read_json_lines, write_text
from distill.runtime import distributed
from distill.runtime.stopping import Stopped
from distill.runtime.trackers import Backend, start_backends
from distill.runtime.tracking_config import TrackingConfig

log = logging.getLogger("distill")

_STRAGGLER = 1.1  # times the mean work: a slower rank is shown beside the loss


def start_logging() -> None:
    """Shows warnings of every rank, and what `log` and the loaders of models note on rank 0."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for each in (log, logging.getLogger("student"), logging.getLogger("teachers")):
        each.setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)


class Tracker:
    """Writes a run's metrics to its `metrics.jsonl` and shows its progress.

    Args:
        folder: the run's folder.
        config: how often and where to report.
        recipe: the resolved recipe, for wandb, TensorBoard and MLflow.
        num_steps: steps of the whole run, for the progress bar.
        start_step: steps done before. Metrics of later steps are deleted, to be written again.
        active: True on rank 0; elsewhere the tracker does nothing.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        recipe: dict[str, Any],
        *,
        num_steps: int,
        start_step: int,
        active: bool,
    ) -> None:
        self._active = active
        self._speed: list[str] = []  # of the last line of metrics
        self._backends: list[Backend] = []
        self._progress: Progress | None = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        _cut_after(path, start_step)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._num_steps = num_steps
        self._backends = start_backends(folder, config, recipe, start_step)
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self._progress = Progress(*columns, text, console=Console(stderr=True))
            self._task = self._progress.add_task("train", total=num_steps, completed=start_step)
            self._progress.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Stopped))

    def advance(self, step: int, loss: float) -> None:
        """Moves the progress bar, if there is one."""
        if self._progress is not None:
            shown = "  ".join([f"loss {loss:.4f}", *self._speed])
            self._progress.update(self._task, completed=step, description=shown)

    def training_metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes and shows the metrics of training.

        Names are grouped by slashes, as in `loss/clip/spatial`. Values that are not finite, such
        as the gradient norm of a step that fp16 skipped, are `null` in the file.

        Args:
            step: optimiser steps done.
            values: with `loss`, `lr`, `grad_norm`, `images_per_s` and the shares of time.
        """
        if not self._active:
            return
        self._store(step, values)
        self._speed = _speed(values)
        if self._progress is None:
            parts = [f"loss {values['loss']:.4f}", f"lr {values['lr']:.2e}"]
            parts += [f"grad {values['grad_norm']:.3f}", *self._speed]
            self._print(step, parts)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Writes and shows any other metrics, such as those of benchmarks during training."""
        if self._active:
            self._store(step, values)
            self._print(step, [f"{name} {value:.4g}" for name, value in values.items()])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hides the progress bar during other work, which can show its own."""
        if self._progress is not None:
            self._progress.stop()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.start()

    def _print(self, step: int, parts: list[str]) -> None:
        print(f"step {step}/{self._num_steps}  " + "  ".join(parts), file=sys.stderr, flush=True)

    def _store(self, step: int, values: dict[str, float]) -> None:
        stored = {name: v if math.isfinite(v) else None for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **stored}) + "\n")
        for backend in self._backends:
            backend.log(step, values)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Passes a picture of the run's folder to the trackers."""
        for backend in self._backends:
            backend.picture(step, name, path)

    def close(self, *, failed: bool = False) -> None:
        """Closes the progress bar, the file and the trackers."""
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        for backend in self._backends:
            backend.close(failed=failed)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics of a run, if any; values that are not finite are None."""
    return read_json_lines(folder / "metrics.jsonl")


def _speed(values: dict[str, float]) -> list[str]:
    parts = [f"{values['images_per_s']:.1f} img/s", f"data {values['time/data']:.0%}"]
    if values.get("slowest_rank_work", 0.0) > _STRAGGLER:
        work = values["slowest_rank_work"]
        parts.append(f"rank {values['slowest_rank']:.0f} works {work:.2f} x the mean")
    return parts


def _cut_after(path: Path, step: int) -> None:
    """Deletes the lines of later steps, and a line that is incomplete because of a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
