"""Losses of the small teachers: image-text contrast, and direction of SqueezeNet's features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """CLIP's softmax contrast (Radford et al., arXiv 2103.00020, 2.3) with several positives.

    The target of a row is spread evenly over its positives, as in SupCon (Khosla et al., arXiv
    2004.11362, equation 2). With one positive for each row and column it is CLIP's loss.

    Args:
        logits: (B, N) scaled similarities of images and texts.
        positive: (B, N) bool, whether the text describes the image; every row has a positive.

    Returns:
        (), the mean over both directions; texts without an image in the batch count for the rows
        only.
    """
    by_image = -logits.log_softmax(1).masked_fill(~positive, 0).sum(1) / positive.sum(1)
    hits = positive.sum(0)
    by_text = -logits.log_softmax(0).masked_fill(~positive, 0).sum(0) / hits.clamp(min=1)
    return (by_image.mean() + by_text[hits > 0].mean()) / 2


def sigmoid_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """SigLIP's pairwise sigmoid loss (Zhai et al., arXiv 2303.15343, equation 1).

    Args:
        logits: (B, N) scaled and biased similarities of images and texts.
        positive: (B, N) bool, whether the text describes the image.

    Returns:
        (), the sum over all pairs divided by the number of images.
    """
    signs = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def direction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of one minus the cosine between vectors (..., D), in [0, 2]."""
    return (1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)).mean()


def matches(labels: Tensor, others: Tensor) -> Tensor:
    """Whether image i of `labels` (B,) and text j of `others` (N,) share a class, (B, N) bool."""
    return labels[:, None] == others[None, :]


def spatial_targets(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolates maps (B, C, h, w) at points (B, n, 2), x and y in [-1, 1], to (B, n, C)."""
    read = F.grid_sample(
        maps, points[:, :, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return torch.squeeze(read, 3).transpose(1, 2)
