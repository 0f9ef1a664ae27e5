"""Where metrics go beside `metrics.jsonl`: wandb, TensorBoard and MLflow.

No other module imports them. A run that resumes continues the same run there. Metrics of steps that
it takes again are written again in TensorBoard, which forgets the first; wandb and MLflow keep the
first, and take no step of a metric twice.
"""

import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill.runtime.config import dump_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.tracking_config import LOCAL, TrackingConfig
from teachers.messages import say_once

_BATCH = 1000  # metrics that an MLflow server takes at once
_NOT_IN_MLFLOW = re.compile(r"[^\w.\- :]")


class Backend(Protocol):
    """A program that shows metrics; used on rank 0 only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes metrics by name, after a number of optimiser steps."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """Takes a picture of the run's folder."""

    def close(self, *, failed: bool) -> None:
        """Waits until everything is written, and says how the run ended."""


def start_backends(
    folder: Path, config: TrackingConfig, recipe: dict[str, Any], start_step: int
) -> list[Backend]:
    """Starts those that a recipe asks for.

    Args:
        folder: the run's folder.
        config: which, and the names there.
        recipe: the resolved recipe, which is kept beside the metrics.
        start_step: steps done before.

    Raises:
        RecipeError: the package of one is missing, or a server cannot be reached.
    """
    started: list[Backend] = []
    if config.wandb != "disabled":
        started.append(_Wandb(folder, config, recipe))
    if config.tensorboard:
        started.append(_TensorBoard(folder, recipe, start_step))
    if config.mlflow is not None:
        started.append(_MLflow(folder, config.mlflow, config, recipe))
    return started


def _missing(key: str, package: str, off: str) -> RecipeError:
    return RecipeError(
        f"tracking.{key}: {package} is not installed; run `pip install {package}`, or set "
        f"tracking.{off}"
    )


class _Wandb:
    def __init__(self, folder: Path, config: TrackingConfig, recipe: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb", "wandb=disabled") from None
        identity = folder / "wandb_run_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        if config.wandb == "offline":
            os.environ.setdefault("WANDB_CACHE_DIR", str(folder.absolute()))  # default: home
        self._image = wandb.Image
        self._run = wandb.init(
            project=config.project,
            name=config.name or folder.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            mode=config.wandb,
            config=recipe,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class _TensorBoard:
    def __init__(self, folder: Path, recipe: dict[str, Any], start_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboard", "tensorboard=false") from None
        # What an earlier process wrote of later steps is forgotten when a reader meets the purge.
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if not start_step:
            self._writer.add_text("recipe", f"```yaml\n{dump_yaml(recipe)}```", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # else a kill loses what a checkpoint has left behind

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.array(picture.convert("RGB")), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _MLflow:
    """Names have dots for slashes: a local store takes `loss` for a file, not for a folder."""

    def __init__(
        self, folder: Path, uri: str, config: TrackingConfig, recipe: dict[str, Any]
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that does not answer must not hold up the training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing("mlflow", "mlflow-skinny", "mlflow=null") from None
        if uri == LOCAL:
            uri = (folder / "mlruns").absolute().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it needs no database
        self._metric, self._errors = Metric, (MlflowException, OSError)
        try:
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._run = self._start(folder, config, recipe)
            self._seen = self._read_steps()
        except self._errors as error:
            raise RecipeError(f"tracking.mlflow: {uri} cannot be used: {error}") from None

    def _start(self, folder: Path, config: TrackingConfig, recipe: dict[str, Any]) -> str:
        """The identity of the run, which the run's folder keeps; of a new run if it has none."""
        identity = folder / "mlflow_run_id"
        if identity.exists():
            run = identity.read_text()
            self._client.update_run(run, status="RUNNING")
            return run
        known = self._client.get_experiment_by_name(config.project)
        experiment = (
            self._client.create_experiment(config.project) if known is None else known.experiment_id
        )
        name = config.name or folder.name
        run = str(self._client.create_run(experiment, run_name=name).info.run_id)
        self._client.log_text(run, dump_yaml(recipe), "recipe.yaml")
        identity.write_text(run)
        return run

    def _read_steps(self) -> dict[str, int]:
        """The last step of each metric that the run has already."""
        names = self._client.get_run(self._run).data.metrics
        histories = {name: self._client.get_metric_history(self._run, name) for name in names}
        return {name: max(each.step for each in rows) for name, rows in histories.items() if rows}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        fresh = []
        for name, value in values.items():
            name = _NOT_IN_MLFLOW.sub("_", name.replace("/", "."))
            # Numbers that are not finite: a server would store the largest float.
            if math.isfinite(value) and step > self._seen.get(name, -1):
                self._seen[name] = step
                fresh.append(self._metric(name, value, now, step))
        for start in range(0, len(fresh), _BATCH):
            part = fresh[start : start + _BATCH]
            self._try(partial(self._client.log_batch, self._run, metrics=part))

    def picture(self, step: int, name: str, path: Path) -> None:
        place = f"pictures/{name}/{step:08d}"
        self._try(lambda: self._client.log_artifact(self._run, str(path), place))

    def close(self, *, failed: bool) -> None:
        status = "FAILED" if failed else "FINISHED"
        self._try(lambda: self._client.set_terminated(self._run, status))

    def _try(self, send: Callable[[], Any]) -> None:
        """Sends something; a training does not end because a server does."""
        try:
            send()
        except self._errors as error:
            say_once(f"tracking.mlflow: not everything was logged: {error}", "tracking.mlflow")
