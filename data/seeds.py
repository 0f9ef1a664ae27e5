"""Randomness as a function of (seed, purpose, place), the same on every machine and version."""

import hashlib
import random
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random number decides; keeps the streams of one seed apart."""

    SHARDS = 1
    WINDOW = 2
    MIXTURE = 3
    LANE = 4


def permutation(num: int, seed: int, purpose: Purpose, *place: int) -> np.ndarray:
    """A random order of range(num), int64 (num,).

    Sorts raw 64-bit numbers: NumPy promises that a bit generator's raw stream never changes, which
    it does not promise for `Generator.permutation`, and a run may be resumed years later.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, purpose, *place]))
    return np.argsort(bits.random_raw(num), kind="stable")


def sample_rng(seed: int, epoch: int, key: str) -> random.Random:
    """The generator of one sample's augmentation in one epoch, wherever and whenever it is read."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest))
