"""Saves and restores the states of the default random generators."""

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
    """Sets the states that `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the default generators after the block, NumPy's too."""
    states, of_numpy = generator_states(), np.random.get_state()
    try:
        yield
    finally:
        restore_generators(states)
        np.random.set_state(of_numpy)
