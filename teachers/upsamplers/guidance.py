"""The image as guidance of upsamplers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD


def area_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (B, D, H, W) by averaging the pixels of cells where axes shrink, else bilinearly.

    The public FeatSharp code interpolates without antialiasing here, which uses 2 x 2 of the
    16 x 16 pixels of a cell and keeps their noise.
    """
    height, width = images.shape[-2:]
    shrunk = (min(height, size[0]), min(width, size[1]))
    if shrunk != (height, width):
        images = F.adaptive_avg_pool2d(images, shrunk)
    if shrunk != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return images


def guidance(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes images (B, 3, H, W) in [0, 1] to `size` cells, with ImageNet's normalisation."""
    pooled = area_resize(images, size)
    # Channel by channel: with tensors of constants, a GPU would wait for their copy from the CPU.
    channels = zip(pooled.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
