"""The states of default random generators: kept in checkpoints, and left as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def generator_states() -> dict[str, Any]:
    """The states of Python's and torch's default generators, on the CPU and this process's GPU."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Goes back to what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever draws from the default generators inside, NumPy's too, leaves no trace in them."""
    states, of_numpy = generator_states(), np.random.get_state()
    try:
        yield
    finally:
        restore_generators(states)
        np.random.set_state(of_numpy)
