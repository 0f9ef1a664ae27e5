"""Multi-view consistency: the loss that trains upsamplers without labels.

The encoder's map of a warped image must equal the high-resolution map after the same warp and
downsampling (FeatUp, arXiv 2403.10516; FeatSharp, arXiv 2502.16025, section 3). All maps are in the
standardised (PHI-S) space, where features have mean 0 and variance 1.

All views share one high-resolution map, so that one backward pass of the sum runs through the
upsampler once, and is correct on any number of ranks.
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from teachers.config import StrictConfig
from teachers.upsamplers.downsampler import Downsampler
from teachers.upsamplers.precision import at_least_float32, no_autocast
from teachers.upsamplers.regularisers import maximum_mean_discrepancy, sampled_crf, total_variation
from teachers.upsamplers.views import valid_mask, warp


class ConsistencyConfig(StrictConfig):
    """Options of the loss; the defaults are FeatSharp's.

    Attributes:
        distance: between the downsampled view and the encoder's map of the view.
        uncertainty: whether a small network learns the uncertainty of each cell.
        uncertainty_dim: hidden channels of that network.
        seam_weight: weight of the cells on both sides of a tile border, relative to 1 elsewhere;
            not used for upsamplers without tiles.
        tv_weight: weight of the total variation of the high-resolution map.
        crf_weight: weight of the sampled CRF of the high-resolution map and the image.
        mmd_weight: weight of the maximum mean discrepancy between the low- and high-resolution
            maps.
    """

    distance: Literal["mse", "smooth_l1", "l1"] = "mse"
    uncertainty: bool = True
    uncertainty_dim: PositiveInt = 256
    seam_weight: Annotated[float, Field(ge=1, le=100)] = 2.0
    tv_weight: NonNegativeFloat = 0.0
    crf_weight: NonNegativeFloat = 0.0
    mmd_weight: NonNegativeFloat = 0.0


class ConsistencyTerms(NamedTuple):
    """The loss and its terms.

    Attributes:
        total: (), to be minimised.
        parts: the weighted terms, () each, detached; their sum is `total`.
        mse: (), the mean squared error of valid cells, detached, in the standardised space and
            without uncertainty or seam weights; a constant prediction of the mean has 1. Fidelity
            is its reciprocal. Average errors, not fidelities: the mean of fidelities is too high.
    """

    total: Tensor
    parts: dict[str, Tensor]
    mse: Tensor


class Consistency(nn.Module):
    """The multi-view consistency loss, with the downsampler and uncertainty that it trains.

    Args:
        config: the options.
        dim: channels D.
        downsampler: from the high-resolution grid to the encoder's.
    """

    def __init__(self, config: ConsistencyConfig, dim: int, downsampler: Downsampler) -> None:
        super().__init__()
        self.config = config
        self.downsampler = downsampler
        self.uncertainty = Uncertainty(dim, config.uncertainty_dim) if config.uncertainty else None

    def forward(
        self,
        high: Tensor,
        targets: Tensor,
        homographies: Tensor,
        *,
        low: Tensor,
        images: Tensor,
        generator: torch.Generator,
    ) -> ConsistencyTerms:
        """Compares every view with the encoder's own map of it.

        Args:
            high: (B, D, H, W) the upsampled map of the base image, standardised.
            targets: (B, n, D, h, w) the encoder's maps of the views, standardised.
            homographies: (B, n, 3, 3) view to base, see `views.sample_homographies`.
            low: (B, D, h, w) the encoder's map of the base image, standardised.
            images: (B, 3, H', W') the base images in [0, 1].
            generator: on the CPU, for the samples of CRF and MMD.

        Returns:
            The loss, its terms and the error of this batch.
        """
        logs = None if self.uncertainty is None else self.uncertainty(high.detach())
        with no_autocast(high):
            high, targets = at_least_float32(high), at_least_float32(targets)
            views = self.downsampler(high, homographies)
            size = (targets.shape[-2], targets.shape[-1])
            mask = valid_mask(homographies.flatten(0, 1), size).view_as(targets[:, :, 0]).to(high)
            error = _DISTANCES[self.config.distance](views, targets).mean(2)
            terms = {"reconstruction": _mean(error * self._weights(logs, high, homographies), mask)}
            if logs is not None:
                terms["uncertainty"] = logs.mean() / 2
            spread = None if logs is None else (-logs).exp()
            terms |= self._regularisers(high, at_least_float32(low), images, spread, generator)
        total = torch.stack(list(terms.values())).sum()
        squares = _mean((views.detach() - targets.detach()).square().mean(2), mask)
        return ConsistencyTerms(
            total, {name: term.detach() for name, term in terms.items()}, squares
        )

    def _weights(self, logs: Tensor | None, high: Tensor, homographies: Tensor) -> Tensor | float:
        """Uncertainty times seam weights of the views' cells, (B, n, h, w), or 1."""
        weights = None if logs is None else (-logs).exp()
        size, factor = (high.shape[-2], high.shape[-1]), self.downsampler.factor
        if self.config.seam_weight != 1:
            tile = (size[0] // factor[0], size[1] // factor[1])
            seams = seam_weights(size, tile, self.config.seam_weight).to(high)
            seams = seams.expand(len(high), 1, -1, -1)
            weights = seams if weights is None else weights * seams
        if weights is None:
            return 1.0
        weights = weights.repeat_interleave(homographies.shape[1], 0)
        # Averaged over each cell: a seam is two cells wide, and point sampling may miss it.
        cells = F.avg_pool2d(warp(weights, homographies.flatten(0, 1), size), factor)
        return cells.view(*homographies.shape[:2], *cells.shape[-2:])

    def _regularisers(
        self,
        high: Tensor,
        low: Tensor,
        images: Tensor,
        weights: Tensor | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The weighted regularisers of non-zero weight; the others are not computed."""
        config, terms = self.config, {}
        if config.tv_weight:
            terms["tv"] = config.tv_weight * total_variation(high, weights)
        if config.crf_weight:
            crf = sampled_crf(high, images, generator, weights)
            terms["crf"] = config.crf_weight * crf
        if config.mmd_weight:
            terms["mmd"] = config.mmd_weight * maximum_mean_discrepancy(low, high, generator)
        return terms


class Uncertainty(nn.Module):
    """Predicts u, the log of twice the expected squared error of each cell; initially zero.

    The loss exp(-u) * error + u / 2 is minimal at u = log(2 error).

    Args:
        dim: channels D of the map.
        hidden_dim: channels between its two convolutions.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(dim, hidden_dim, 5)
        self.out = nn.Conv2d(hidden_dim, 1, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, maps: Tensor) -> Tensor:
        """From (B, D, H, W) to (B, 1, H, W), at least float32."""
        # Reflecting two cells beyond the border needs three inside.
        mode = "reflect" if min(maps.shape[-2:]) > 2 else "replicate"
        hidden = F.gelu(self.hidden(F.pad(maps, (2, 2, 2, 2), mode=mode)))
        return at_least_float32(self.out(hidden))


def seam_weights(size: tuple[int, int], tile: tuple[int, int], weight: float) -> Tensor:
    """Weights that emphasise the seams between tiles.

    Args:
        size: (H, W) cells of the high-resolution map.
        tile: (h, w) cells of a tile.
        weight: of the rows or columns of cells on both sides of a seam, relative to 1 elsewhere.

    Returns:
        (H, W) float32, with mean 1.
    """
    at_seam = []
    for length, step in zip(size, tile, strict=True):
        cell = torch.arange(length)
        starts, ends = (
            (cell % step == 0) & (cell > 0),
            ((cell + 1) % step == 0) & (cell < length - 1),
        )
        at_seam.append(starts | ends)
    seams = at_seam[0][:, None] | at_seam[1]
    weights = 1 + (weight - 1) * seams.float()
    return weights / weights.mean()


def _mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid cells of each view, then over views: two (B, n, h, w) to ().

    A view of which less than half is valid counts less, so that few cells do not weigh as a view.
    """
    count = mask.sum((0, 2, 3)).clamp(min=mask[:, 0].numel() / 2)
    return ((errors * mask).sum((0, 2, 3)) / count).mean()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda view, target: (view - target).square(),
    "smooth_l1": lambda view, target: F.smooth_l1_loss(view, target, reduction="none"),
    "l1": lambda view, target: (view - target).abs(),
}
