"""Reads what trackers hold of a run, by their own readers."""

import os
from pathlib import Path
from typing import Any

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

Values = dict[str, list[tuple[int, float]]]  # name -> (step, value)


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def tensorboard_values(folder: Path) -> Values:
    """The numbers of a run's folder, in the order of writing."""
    events = _events(folder)
    names = events.Tags()["scalars"]
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in names}


def tensorboard_pictures(folder: Path) -> dict[str, list[int]]:
    """The steps of the pictures of a run's folder."""
    events = _events(folder)
    return {name: [each.step for each in events.Images(name)] for name in events.Tags()["images"]}


def _client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=(folder / "mlruns").absolute().as_uri())


def mlflow_run(folder: Path) -> Any:
    """The only run in a run's folder."""
    client = _client(folder)
    experiment = client.get_experiment_by_name("featsharp-distill")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def mlflow_values(folder: Path) -> Values:
    """All numbers that the run ever had."""
    client, run = _client(folder), mlflow_run(folder)
    histories = {
        name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics
    }
    return {
        name: sorted((each.step, each.value) for each in rows) for name, rows in histories.items()
    }
