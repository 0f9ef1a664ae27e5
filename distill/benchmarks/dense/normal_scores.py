"""Surface normals: computed from depth and a focal length, and the metrics of their angles.

The components point right, down, and into the scene: a wall that faces the camera has (0, 0, -1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHARES = (11.25, 22.5, 30.0)  # degrees
NUM_SUMS = 2 + len(SHARES) + 1  # pixels, angles, squares of them, and pixels within each share


def normals_of_depth(
    depth: Tensor, focal_px: float, centre: tuple[float, float], step: int = 1
) -> Tensor:
    """Normals as cross products of central differences of the pixels' points in space.

    Args:
        depth: (H, W) along the camera's axis, 0 where unknown; any unit.
        focal_px: focal length in pixels.
        centre: (row, column) that the camera looks at, from the top left corner.
        step: reach of the differences in pixels to either side; larger for coarsely stored depth.

    Returns:
        (3, H, W) unit vectors that face the camera; 0 where a pixel of the differences is unknown
        or outside of the image.
    """
    height, width = depth.shape
    z = depth.double()
    rows, columns = (torch.arange(n, dtype=z.dtype, device=z.device) + 0.5 for n in depth.shape)
    rows, columns = rows[:, None] - centre[0], columns - centre[1]
    points = torch.stack([columns / focal_px * z, rows / focal_px * z, z])
    result = torch.zeros_like(points)
    s = step
    if height <= 2 * s or width <= 2 * s:
        return result.float()
    inner = (..., slice(s, -s), slice(s, -s))
    across = points[:, s:-s, 2 * s :] - points[:, s:-s, : -2 * s]
    down = points[:, 2 * s :, s:-s] - points[:, : -2 * s, s:-s]
    vectors = F.normalize(torch.linalg.cross(down, across, dim=0), dim=0)
    known = z > 0
    whole = known[s:-s, 2 * s :] & known[s:-s, : -2 * s] & known[2 * s :, s:-s]
    whole &= known[: -2 * s, s:-s] & known[inner]
    facing = -((vectors * points[inner]).sum(0).sign())
    result[inner] = vectors * facing * whole
    return result.float()


def normal_colours(normals: Tensor) -> Tensor:
    """Normals as a picture (3, H, W): [-1, 1] is mapped to [0, 1]; black where unknown."""
    return (normals + 1) / 2 * (normals != 0).any(0, keepdim=True)


def angles(prediction: Tensor, truth: Tensor) -> Tensor:
    """Angles in degrees between vectors (3, N) of any length; (N,) float64.

    Computed by the arc tangent of sine and cosine, which is exact for small angles too. The angle
    to a vector of length 0 is 90.
    """
    a, b = prediction.double(), truth.double()
    sine = torch.linalg.cross(a, b, dim=0).norm(dim=0)
    degrees = torch.atan2(sine, (a * b).sum(0)) * (180 / math.pi)
    return torch.where((a == 0).all(0) | (b == 0).all(0), 90.0, degrees)


def normal_sums(prediction: Tensor, truth: Tensor) -> Tensor:
    """The sums that the metrics of one image are computed from.

    Args:
        prediction: (3, H, W).
        truth: (3, H, W) unit vectors, 0 where unknown.

    Returns:
        (NUM_SUMS,) float64.
    """
    known = (truth != 0).any(0)
    error = angles(prediction[:, known], truth[:, known])
    sums = [torch.ones_like(error).sum(), error.sum(), error.square().sum()]
    return torch.stack(sums + [(error < limit).double().sum() for limit in SHARES])


def normal_scores(sums: Tensor) -> dict[str, float]:
    """The metrics of a test set: angles in degrees, and shares of pixels in per cent.

    Args:
        sums: (N, NUM_SUMS), one row for each image; images without a known pixel do not count.

    Raises:
        RuntimeError: no image has a pixel of known normal.
    """
    sums = sums[sums[:, 0] > 0]
    if not len(sums):
        raise RuntimeError("metrics of normals: no image has a pixel of known normal")
    metrics = {}
    for name, rows in (("per_image", sums), ("pooled", sums.sum(0, keepdim=True))):
        means = rows[:, 1:] / rows[:, :1]
        metrics[f"mean_angle_{name}"] = float(means[:, 0].mean())
        metrics[f"rmse_angle_{name}"] = float(means[:, 1].sqrt().mean())
        for place, limit in enumerate(SHARES):
            metrics[f"within_{limit:g}_{name}"] = 100 * float(means[:, 2 + place].mean())
    return metrics
