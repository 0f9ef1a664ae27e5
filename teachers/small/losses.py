"""What the small teachers minimise: image-text contrast, and agreement with SqueezeNet's maps."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """CLIP's softmax contrast (Radford et al. 2021, section 2.3) with several positives.

    A row's target is spread evenly over its positives, as in SupCon (Khosla et al. 2020, eq. 2);
    with one positive a row and a column it is CLIP's own loss.

    Args:
        logits: (B, N) scaled similarity of images and texts.
        positive: (B, N) bool, whether the text describes the image; every row has one.

    Returns:
        The mean of both directions; texts without an image in the batch count for the rows only.
    """
    by_image = -logits.log_softmax(1).masked_fill(~positive, 0).sum(1) / positive.sum(1)
    hits = positive.sum(0)
    by_text = -logits.log_softmax(0).masked_fill(~positive, 0).sum(0) / hits.clamp(min=1)
    return (by_image.mean() + by_text[hits > 0].mean()) / 2


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """SigLIP's pairwise loss (Zhai et al. 2023, eq. 1): each pair is its own yes or no.

    Args:
        logits: (B, N) scaled and biased similarity of images and texts.
        positive: (B, N) bool, whether the text describes the image.

    Returns:
        The sum over all pairs, divided by the number of images.
    """
    signs = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def direction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine between vectors (..., D), averaged: 0 at best, 2 at worst."""
    return (1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)).mean()


def matches(labels: Tensor, others: Tensor) -> Tensor:
    """(B, N) bool: whether image i of `labels` (B,) and text j of `others` (N,) share a class."""
    return labels[:, None] == others[None, :]


def spatial_targets(maps: Tensor, points: Tensor) -> Tensor:
    """Reads maps (B, C, h, w) at points (B, n, 2), x and y in [-1, 1]; returns (B, n, C)."""
    read = F.grid_sample(
        maps, points[:, :, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return torch.squeeze(read, 3).transpose(1, 2)
