"""The `tracking` section of a recipe."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator

from teachers.config import StrictConfig
from teachers.messages import did_you_mean

LOCAL = "local"  # MLflow's files in the run's folder


class TrackingConfig(StrictConfig):
    """The `tracking` section of a recipe.

    Attributes:
        every: optimiser steps between two lines of metrics.
        pictures_every: steps between two PCA pictures; 0 draws none.
        wandb: `offline` writes to the run's folder, `online` uploads, `disabled` does neither.
        tensorboard: whether event files are written to `tensorboard` in the run's folder.
        mlflow: `local` writes to `mlruns` in the run's folder; else the URI of a tracking server,
            or None.
        project: wandb's project, and MLflow's experiment.
        name: the run's name there; None is the name of the run's folder.
    """

    every: PositiveInt = 10
    pictures_every: NonNegativeInt = 0
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    tensorboard: bool = False
    mlflow: str | None = None
    project: str = "featsharp-distill"
    name: str | None = None

    @field_validator("mlflow")
    @classmethod
    def _is_a_place(cls, uri: str | None) -> str | None:
        if uri is None or uri == LOCAL or uri.startswith("databricks") or ":/" in uri:
            return uri
        raise ValueError(
            f"expected {LOCAL} or the URI of a server, such as http://host:5000, got {uri!r}"
            f"{did_you_mean(uri, [LOCAL])}"
        )
