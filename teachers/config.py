"""The base of configuration classes."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A section of a recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
