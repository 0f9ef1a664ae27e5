"""Batches of the training stream, their pixels and their bad samples."""

from typing import NamedTuple

import torch
from torch import Tensor


class BadSample(NamedTuple):
    """A sample that could not be used.

    Attributes:
        shard: name of the shard, as in `Batch.keys`.
        key: key inside the shard; empty for a defect without a key (a whole shard, a gap).
        reason: what is wrong with it, in words.
    """

    shard: str
    key: str
    reason: str


class Batch(NamedTuple):
    """A micro-batch of one rank.

    Attributes:
        images: (B, 3, H, W) uint8, RGB.
        keys: "shard.tar/key" of each image, unique in the dataset.
        bad: samples that were replaced by others while this batch was read.
    """

    images: Tensor
    keys: list[str]
    bad: tuple[BadSample, ...]

    def pixels(self, device: torch.device) -> Tensor:
        """The images (B, 3, H, W) as float32 in [0, 1] on a device, copied without waiting."""
        return scale_pixels(self.images, device, non_blocking=True)


def scale_pixels(
    images: Tensor, device: torch.device | None = None, *, non_blocking: bool = False
) -> Tensor:
    """uint8 images of any shape as float32 in [0, 1], on the device where one is given."""
    return images.to(device, non_blocking=non_blocking).float() / 255
