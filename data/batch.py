"""What the training stream yields."""

from typing import NamedTuple

from torch import Tensor


class BadSample(NamedTuple):
    """A sample that could not be used.

    Attributes:
        shard: name of the shard, as it stands in keys.
        key: key inside the shard; empty where the defect has none (a whole shard, a gap).
        reason: what is wrong with it, for people.
    """

    shard: str
    key: str
    reason: str


class Batch(NamedTuple):
    """A micro-batch of one rank.

    Attributes:
        images: (B, 3, H, W) uint8, RGB.
        keys: B times "shard.tar/key", unique in the data set.
        bad: samples that were replaced by others while this batch was read.
    """

    images: Tensor
    keys: list[str]
    bad: tuple[BadSample, ...]
