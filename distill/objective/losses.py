"""Losses between one student head and one teacher: pure functions of tensors, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_COSINE = 1 - 1e-6  # the arc cosine has an infinite slope at 1; C-RADIOv4 clamps here too


def cosine_summary_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cos(prediction, target), both (B, D) (AM-RADIO, section 3.3)."""
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angles in radians between the vectors of two (B, D) or (D,) tensors."""
    cosine = F.cosine_similarity(a, b, dim=-1)
    return torch.acos(cosine.clamp(-_MAX_COSINE, _MAX_COSINE))


def angle_summary_loss(prediction: Tensor, target: Tensor, dispersion: Tensor) -> Tensor:
    """Mean squared angle, divided by the teacher's own angular dispersion (C-RADIOv4).

    A constant prediction along the teacher's mean direction costs 1, for every teacher.

    Args:
        prediction: (B, D).
        target: (B, D).
        dispersion: () mean squared angle between the teacher's summaries and their mean direction.
    """
    return angles(prediction, target).square().mean() / dispersion


def mse_spatial_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of maps (B, D, h, w); zero costs 1 on PHI-S targets (PHI-S, section 3)."""
    return F.mse_loss(prediction, target)


def cosine_smooth_l1_spatial_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """0.9 (1 - cos) + 0.1 smooth-L1 with beta 2, of maps (B, D, h, w) (AM-RADIO, equation 3)."""
    cosine = (1 - F.cosine_similarity(prediction, target, dim=1)).mean()
    return 0.9 * cosine + 0.1 * F.smooth_l1_loss(prediction, target, beta=2.0)


def match_grids(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Resizes two maps to the smaller of their grids along each axis; equal grids are not resized.

    The student's head runs before this, on the student's own grid, because attention and
    normalisation do not commute with interpolation.

    Returns:
        Both, from (B, D, h, w) and (B, D, h', w') to (B, D, min(h, h'), min(w, w')), bilinear with
        antialiasing, half-pixel centres.
    """
    grid = [min(p, t) for p, t in zip(prediction.shape[-2:], target.shape[-2:], strict=True)]

    def resized(x: Tensor) -> Tensor:
        if list(x.shape[-2:]) == grid:
            return x
        return F.interpolate(x, grid, mode="bilinear", antialias=True, align_corners=False)

    return resized(prediction), resized(target)
