"""Predictions for every pixel of an image: of the whole image, or of sliding windows."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.benchmarks.dense.dense_map import dense_map, to_pixels
from distill.benchmarks.dense.pixel_samples import ResolvedInput, cut, input_size, windows
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize

_probabilities = partial(torch.softmax, dim=1)


@torch.no_grad()
def predict(
    encoder: Teacher,
    heads: Sequence[nn.Module],
    image: Tensor,
    config: ResolvedInput,
    size: tuple[int, int],
    batch_size: int,
    averaged: Callable[[Tensor], Tensor] = _probabilities,
) -> list[Tensor]:
    """The predictions of heads for each pixel of an image.

    Args:
        encoder: frozen.
        heads: each maps (B, D, h, w) to (B, K, h, w), logits for example.
        image: (3, H, W) in [0, 1].
        config: resolved for the encoder.
        size: (height, width) of the result in pixels.
        batch_size: windows that are encoded at once.
        averaged: maps predictions (B, K, H, W) to the values that sliding windows average.

    Returns:
        (K, *size) for each head: its prediction, or with sliding windows the mean of `averaged`.
    """
    pixels = image[None].to(encoder.mean.device)
    pixels = resize(pixels, input_size(config, image.shape[-2], image.shape[-1]))
    if config.stride is None:
        maps, covers = dense_map(encoder, pixels)
        inside = (pixels.shape[-2], pixels.shape[-1])
        scores = [to_pixels(head(maps), covers, inside) for head in heads]
    else:
        assert config.crop is not None
        scores = _slide(encoder, heads, pixels, config.crop, config.stride, batch_size, averaged)
    return [_fitted(each, size)[0] for each in scores]


def _slide(
    encoder: Teacher,
    heads: Sequence[nn.Module],
    pixels: Tensor,
    crop: tuple[int, int],
    stride: tuple[int, int],
    batch_size: int,
    averaged: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The mean over the windows that cover each pixel, (1, K, H, W) for each head."""
    height, width = pixels.shape[-2:]
    rim = (0, max(0, crop[1] - width), 0, max(0, crop[0] - height))
    pixels = F.pad(pixels, rim)  # black, like the padding of training crops
    corners = windows((pixels.shape[-2], pixels.shape[-1]), crop, stride)
    counts = pixels.new_zeros(pixels.shape[-2:])
    sums: list[Tensor] = []
    for start in range(0, len(corners), batch_size):
        part = corners[start : start + batch_size]
        maps, covers = dense_map(encoder, torch.cat([cut(pixels, c, crop) for c in part]))
        for number, head in enumerate(heads):
            seen = averaged(to_pixels(head(maps), covers, crop))
            if len(sums) <= number:
                sums.append(pixels.new_zeros(1, seen.shape[1], *pixels.shape[-2:]))
            for one, corner in zip(seen, part, strict=True):
                cut(sums[number], corner, crop).add_(one)
        for corner in part:
            cut(counts, corner, crop).add_(1)
    return [(total / counts)[..., :height, :width] for total in sums]


def _fitted(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Predictions resized to the grid of the labels: bilinear, without antialias."""
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)
