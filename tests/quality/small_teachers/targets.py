"""Targets of the tokens: SqueezeNet's feature maps, computed once for each image.

A crop of an image takes the same crop of its map, as in ReLabel (Yun et al., arXiv 2101.05022), so
the network never runs during training.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

SIDE = 192  # pixels of the resized images; their maps are 11 x 11
CHANNELS = 256
_MEAN = (123.0, 117.0, 104.0)


class Maps(NamedTuple):
    """Whitened feature maps of SqueezeNet's last layer.

    Attributes:
        labelled: (N, 256, 11, 11) float16.
        photos: (M, 256, 11, 11) float16.
    """

    labelled: Tensor
    photos: Tensor


def load_squeezenet(data: Path) -> nn.Module:
    """Feature layers of SqueezeNet 1.0 with ImageNet weights: 512 channels, stride 16."""
    from torchvision.models import squeezenet1_0

    network = squeezenet1_0()
    arrays = np.load(data / "weights" / "squeezenet1_0_rgb255_f16.npz")
    network.load_state_dict({name: torch.from_numpy(arrays[name]).float() for name in arrays})
    return network.features.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def _run(network: nn.Module, images: Tensor, purpose: str) -> Tensor:
    mean = torch.tensor(_MEAN).view(1, 3, 1, 1)
    maps = []
    for chunk in track(images.split(64), description=purpose):
        pixels = F.interpolate(
            chunk.float(), size=(SIDE, SIDE), mode="bicubic", antialias=True
        ).clamp(0, 255)
        with torch.autocast("cpu", torch.bfloat16):
            maps.append(network((pixels - mean).to(memory_format=torch.channels_last)).half())
    return torch.cat(maps)


def fit_whitening(pooled: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """PCA whitening of image vectors.

    Args:
        pooled: (N, D) one vector for each image.
        channels: number of principal directions to keep.

    Returns:
        The mean (D,) and the matrix (D, channels) of x -> (x - mean) @ matrix, float32.
    """
    values = pooled.double()
    mean = values.mean(0)
    covariance = (values - mean).T @ (values - mean) / len(values)
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances[-channels:].flip(0), directions[:, -channels:].flip(1)
    return mean.float(), (directions / variances.sqrt()).float()


def _whiten(maps: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    flat = maps.flatten(2).transpose(1, 2)
    whitened = torch.cat([((c.float() - mean) @ matrix).half() for c in flat.split(256)])
    return whitened.transpose(1, 2).unflatten(2, maps.shape[-2:]).contiguous()


def compute_maps(data: Path, labelled: Tensor, photos: Tensor) -> Maps:
    """Runs SqueezeNet on all images; the whitening is fitted to the means of the labelled maps.

    Args:
        data: the folder of data sets, which holds the weights.
        labelled: (N, 3, H, W) uint8.
        photos: (M, 3, H, W) uint8.
    """
    network = load_squeezenet(data)
    maps = [_run(network, labelled, "labelled"), _run(network, photos, "photos")]
    mean, matrix = fit_whitening(maps[0].float().mean((2, 3)), CHANNELS)
    return Maps(*(_whiten(m, mean, matrix) for m in maps))


def load_maps(cache: Path, data: Path, labelled: Tensor, photos: Tensor) -> Maps:
    """Loads the maps from `cache`; computes and writes them there the first time."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(compute_maps(data, labelled, photos)._asdict(), cache)
    return Maps(**torch.load(cache, mmap=True))
