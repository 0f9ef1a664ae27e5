"""Random crops as boxes that apply to an image and to its map of targets alike.

A box is (x, y, half width, half height) in the coordinates of `grid_sample` with
`align_corners=False`: the image spans [-1, 1] along both axes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.25, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes (count, 4) inside the image, half of them mirrored (negative half width)."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    area = uniform(*SCALE)
    ratio = uniform(torch.tensor(RATIO[0]).log().item(), torch.tensor(RATIO[1]).log().item()).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirrored = torch.rand(count, generator=generator) < 0.5
    return torch.stack([x, y, torch.where(mirrored, -width, width), height], 1)


def cell_centres(height: int, width: int) -> Tensor:
    """Centres (height * width, 2) of the cells, x and y in [-1, 1], in row-major order."""
    y = (torch.arange(height) + 0.5) * 2 / height - 1
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1).flatten(0, 1)


def to_picture(points: Tensor, boxes: Tensor) -> Tensor:
    """Converts points in crops, (n, 2) or (B, n, 2), to image coordinates (B, n, 2)."""
    return boxes[:, None, :2] + points * boxes[:, None, 2:]


def crop(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crops boxes from uint8 images (B, 3, H, W): (B, 3, side, side) float in [0, 1]."""
    grid = to_picture(cell_centres(side, side), boxes).unflatten(1, (side, side))
    pixels = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return pixels / 255


def jitter(images: Tensor, generator: torch.Generator, strength: float = 0.3) -> Tensor:
    """Jitters contrast, brightness and tint of images (B, 3, H, W), clamped to [0, 1]."""
    shape = (2, len(images), 1, 1, 1)
    gain, shift = (torch.rand(shape, generator=generator) * 2 - 1) * strength
    tint = (torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1) * (strength / 3)
    middle = images.mean((2, 3), keepdim=True)
    return ((images - middle) * (1 + gain) + middle * (1 + shift / 2 + tint)).clamp(0, 1)
