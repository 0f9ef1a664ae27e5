"""Random numbers as a function of seed, purpose and position, equal on every machine."""

import hashlib
import random
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Uses of random numbers, which give independent streams from one seed."""

    SHARDS = 1
    WINDOW = 2
    MIXTURE = 3
    LANE = 4


def permutation(num: int, seed: int, purpose: Purpose, *place: int) -> np.ndarray:
    """A random permutation of range(num), int64 (num,).

    It sorts raw 64-bit numbers, which NumPy guarantees never to change for a bit generator, unlike
    `Generator.permutation`: a run may be resumed years later.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, purpose, *place]))
    return np.argsort(bits.random_raw(num), kind="stable")


def sample_rng(seed: int, epoch: int, key: str, crops: int | None = None) -> random.Random:
    """The random generator for the augmentation of one sample in one epoch.

    Args:
        seed: of the run.
        epoch: of the sample's source, from 0.
        key: of the sample.
        crops: number of different crops, which the epochs take in turn; None for no limit.
    """
    if crops is not None:
        epoch %= crops
    place = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")  # shards have any names
    digest = hashlib.blake2b(place, digest_size=16).digest()
    return random.Random(int.from_bytes(digest))
