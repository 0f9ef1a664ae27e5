"""What an image-guided upsampler sees of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD


def area_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages the pixels of each cell where an axis shrinks; bilinear where it grows.

    Interpolating without antialiasing, as the public FeatSharp code does here, reads 2 x 2 of the
    16 x 16 pixels of a cell and leaves their noise in (reference/featsharp.md 3.4).

    Args:
        images: (B, D, H, W).
        size: (height, width) to reach.
    """
    height, width = images.shape[-2:]
    shrunk = (min(height, size[0]), min(width, size[1]))
    if shrunk != (height, width):
        images = F.adaptive_avg_pool2d(images, shrunk)
    if shrunk != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return images


def guidance(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The image on the grid of `size`, whitened with ImageNet's mean and deviation.

    Args:
        images: (B, 3, H, W) in [0, 1], at any size.
        size: (height, width) of the grid, in cells.

    Returns:
        (B, 3, height, width).
    """
    pooled = area_resize(images, size)
    # Channel by channel: constants made on the CPU would have a GPU wait for their copy.
    channels = zip(pooled.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
