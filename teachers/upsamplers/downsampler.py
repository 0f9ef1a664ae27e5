"""Downsamples high-resolution maps to the encoder's grid, to train upsamplers.

The attention downsampler of FeatUp (arXiv 2403.10516) and FeatSharp (arXiv 2502.16025), with three
corrections of the public code: windows are centred on their cell, taps beyond the border are left
out rather than zero, and nothing is random.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.upsamplers.precision import at_least_float32, no_autocast
from teachers.upsamplers.views import bilinear_taps, warp

# exp(-sqrt(2) t^2), normalised: five taps of a Gaussian with a standard deviation of 0.6 cells.
_BLUR = (0.0023, 0.1631, 0.6692, 0.1631, 0.0023)


class Downsampler(nn.Module, ABC):
    """Averages a warped high-resolution map over a window around each low-resolution cell.

    Args:
        factor: (fh, fw) high-resolution cells for each low-resolution cell, per axis.
        kernel: (kh, kw) cells of the window, per axis.

    Raises:
        TeacherError: the window does not cover its cell, or cannot be centred on it.
    """

    def __init__(self, factor: tuple[int, int], kernel: tuple[int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.kernel = kernel
        for f, k in zip(factor, kernel, strict=True):
            if k < f or (k - f) % 2:
                raise TeacherError(
                    f"downsampler.kernel: a window of {k} taps cannot be centred on {f} cells "
                    f"and cover them; choose {f}, {f + 2}, {f + 4}, ..."
                )

    @abstractmethod
    def weights(self, maps: Tensor, homographies: Tensor) -> Tensor:
        """Weights of the taps of all windows; for the arguments see `forward`.

        Returns:
            (B * n, h, w, kh, kw), zero for taps beyond the border of the view, with sum one.
        """

    def forward(self, maps: Tensor, homographies: Tensor) -> Tensor:
        """Warps and downsamples: predicts the encoder's map of each view.

        Args:
            maps: (B, D, fh * h, fw * w).
            homographies: (B, n, 3, 3) view to base, see `views.sample_homographies`; on the same
                device.

        Returns:
            (B, n, D, h, w), float32, or float64 for float64 maps.

        Raises:
            ValueError: the map's size is not a multiple of the factor.
        """
        height, width = maps.shape[-2:]
        if height % self.factor[0] or width % self.factor[1]:
            raise ValueError(
                f"a map of {height} x {width} cells is not a multiple of "
                f"{self.factor[0]} x {self.factor[1]}"
            )
        with no_autocast(maps):
            maps = at_least_float32(maps)
            return self._gather(maps, homographies, self.weights(maps, homographies))

    def _gather(self, maps: Tensor, homographies: Tensor, weights: Tensor) -> Tensor:
        """Computes the weighted sums directly from the base map, without building the views.

        Interpolation and the window's average are both linear, so a window of k cells of a view is
        a sum of 4k cells of the base. As an embedding bag, it costs a fraction of a warp.
        """
        batch, dim, height, width = maps.shape
        taps, shares = bilinear_taps(homographies.flatten(0, 1), (height, width))
        image = torch.arange(batch, dtype=taps.dtype, device=taps.device)
        image = image.repeat_interleave(homographies.shape[1]) * (height * width)
        rows = rearrange(
            self._windows(taps + image[:, None, None, None], 0),
            "n t h w kh kw -> (n h w) (t kh kw)",
        )
        shares = self._windows(shares.to(maps), 0)
        bags = rearrange(shares * weights[:, None], "n t h w kh kw -> (n h w) (t kh kw)")
        table = rearrange(maps, "b d h w -> (b h w) d").contiguous()
        sums = F.embedding_bag(rows, table, per_sample_weights=bags, mode="sum")
        return sums.view(batch, -1, *weights.shape[1:3], dim).permute(0, 1, 4, 2, 3)

    def _windows(self, maps: Tensor, beyond: float) -> Tensor:
        """Windows (N, D, h, w, kh, kw) of maps (N, D, H, W), padded with the value `beyond`."""
        rows, columns = ((k - f) // 2 for k, f in zip(self.kernel, self.factor, strict=True))
        padded = F.pad(maps, (columns, columns, rows, rows), value=beyond)
        return padded.unfold(2, self.kernel[0], self.factor[0]).unfold(
            3, self.kernel[1], self.factor[1]
        )


class BoxDownsampler(Downsampler):
    """The plain average over each low-resolution cell of `factor` (fh, fw) cells."""

    def __init__(self, factor: tuple[int, int]) -> None:
        super().__init__(factor, factor)

    def weights(self, maps: Tensor, homographies: Tensor) -> Tensor:
        """Equal weights; see `Downsampler.weights`."""
        views, fh, fw = homographies.shape[:2].numel(), *self.factor
        cells = maps.shape[2] // fh, maps.shape[3] // fw
        return maps.new_full((1,) * 5, 1 / (fh * fw)).expand(views, *cells, fh, fw)


class AttentionDownsampler(Downsampler):
    """A weighted average over a window around each low-resolution cell.

    The weights are a softmax over the window's taps. The logit of a tap is a linear function of the
    blurred features of the cell under it, plus a learned bias of the tap. A window extends half a
    low-resolution cell, rounded up, beyond its cell on each side: 2f taps for even f, 2f + 1 for
    odd f, so that it is centred for every factor. Initially the linear function is zero and the
    biases are those of a Gaussian with the variance of the cell, close to its plain average.

    Per-channel constants pass through unchanged, at borders too.

    Args:
        dim: channels D.
        factor: (fh, fw) high-resolution cells for each low-resolution cell, per axis.
        kernel: taps of the window, per axis; None for the rule above.

    Raises:
        TeacherError: the window does not cover its cell, or cannot be centred on it.
    """

    def __init__(
        self, dim: int, factor: tuple[int, int], kernel: tuple[int, int] | None = None
    ) -> None:
        super().__init__(
            factor, kernel or (2 * factor[0] + factor[0] % 2, 2 * factor[1] + factor[1] % 2)
        )
        self.logit = nn.Parameter(torch.zeros(dim))
        y, x = (  # distance from the cell's centre, in low-resolution cells
            (torch.arange(k) - (k - 1) / 2) / f
            for f, k in zip(self.factor, self.kernel, strict=True)
        )
        self.tap_bias = nn.Parameter(-6 * (y[:, None] ** 2 + x**2))

    def weights(self, maps: Tensor, homographies: Tensor) -> Tensor:
        """The softmax of logits and biases; see `Downsampler.weights`."""
        # A projection to one channel commutes with warps and blurs, so it is done first.
        logits = torch.einsum("bdhw,d->bhw", maps, self.logit)[:, None]
        logits = logits.repeat_interleave(homographies.shape[1], 0)
        size = (maps.shape[2], maps.shape[3])
        logits = _blur(warp(logits, homographies.flatten(0, 1), size))
        windows = self._windows(logits, -torch.inf)[:, 0] + self.tap_bias
        return windows.flatten(3).softmax(3).view(windows.shape)


def _blur(maps: Tensor) -> Tensor:
    """Blurs (B, 1, H, W) slightly; the border is repeated, so that constants stay constant."""
    taps = maps.new_tensor(_BLUR)
    taps = taps / taps.sum()
    padded = F.pad(maps, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 5, 1)), taps.view(1, 1, 1, 5))
