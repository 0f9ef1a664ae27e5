"""From a high-resolution map back to the encoder's grid; used only while an upsampler trains.

The attention downsampler of FeatUp (arXiv 2403.10516) and FeatSharp (arXiv 2502.16025), changed
where the public code is off: windows are centred on the cell they stand for, taps beyond the
border are left out rather than zero, and nothing is random.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.upsamplers.local_gather import local_gather

# exp(-sqrt(2) t^2), normalised: five taps of a Gaussian with a standard deviation of 0.6 cells.
_BLUR = (0.0023, 0.1631, 0.6692, 0.1631, 0.0023)


class BoxDownsampler(nn.Module):
    """The plain average over each low-resolution cell.

    Args:
        factor: (fh, fw) high-resolution cells in a low-resolution one, per axis.
    """

    def __init__(self, factor: tuple[int, int]) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, maps: Tensor) -> Tensor:
        """Downsamples.

        Args:
            maps: (B, D, fh * h, fw * w).

        Returns:
            (B, D, h, w).

        Raises:
            ValueError: the map holds no whole number of cells.
        """
        low_size(maps, self.factor)
        return F.avg_pool2d(maps, self.factor)


class AttentionDownsampler(nn.Module):
    """A weighted average over a window around each low-resolution cell.

    Weights are a softmax over the window's taps of a logit of the cell under the tap (a linear
    function of its blurred features) plus a learned bias of the tap. A window reaches half a cell,
    rounded up, beyond the cell on each side: 2f taps for even f, 2f + 1 for odd f, so that it is
    centred on the cell for every factor. At the start logits are zero and the biases are those of
    a Gaussian with the variance of the cell, so that training starts near its plain average.

    Per-channel constants pass through unchanged, at borders too.

    Args:
        dim: channels D.
        factor: (fh, fw) high-resolution cells in a low-resolution one, per axis.
        kernel: taps of the window, per axis; None for the rule above.

    Raises:
        TeacherError: a window that does not cover its cell, or cannot be centred on it.
    """

    def __init__(
        self, dim: int, factor: tuple[int, int], kernel: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.factor = factor
        self.kernel = kernel or (2 * factor[0] + factor[0] % 2, 2 * factor[1] + factor[1] % 2)
        for f, k in zip(self.factor, self.kernel, strict=True):
            if k < f or (k - f) % 2:
                raise TeacherError(
                    f"downsampler.kernel: {k} taps over {f} cells cannot be centred and cover "
                    f"them; choose {f}, {f + 2}, {f + 4}, ..."
                )
        self.logit = nn.Parameter(torch.zeros(dim))
        y, x = (  # distance from the cell's centre, in low-resolution cells
            (torch.arange(k) - (k - 1) / 2) / f
            for f, k in zip(self.factor, self.kernel, strict=True)
        )
        self.tap_bias = nn.Parameter(-6 * (y[:, None] ** 2 + x**2))

    def forward(self, maps: Tensor) -> Tensor:
        """Downsamples.

        Args:
            maps: (B, D, fh * h, fw * w).

        Returns:
            (B, D, h, w), float32, or float64 for float64 maps.

        Raises:
            ValueError: the map holds no whole number of cells.
        """
        h, w = low_size(maps, self.factor)
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps if maps.dtype == torch.float64 else maps.float()
            weights = self.weights(maps)
            rows, columns = (torch.arange(n) * f for n, f in zip((h, w), self.factor, strict=True))
            return local_gather(F.pad(maps, self._beyond), weights, rows, columns)

    def weights(self, maps: Tensor) -> Tensor:
        """The weight of every tap, (B, h, w, kh, kw): zero beyond the border, sum one."""
        # The projection goes first: it and the blur commute, and one channel is blurred, not D.
        logits = _blur(torch.einsum("bdhw,d->bhw", maps, self.logit)[:, None])[:, 0]
        padded = F.pad(logits, self._beyond, value=-torch.inf)
        windows = padded.unfold(1, self.kernel[0], self.factor[0])
        windows = windows.unfold(2, self.kernel[1], self.factor[1]) + self.tap_bias
        return windows.flatten(3).softmax(3).view(windows.shape)

    @property
    def _beyond(self) -> tuple[int, int, int, int]:
        """Cells by which windows pass the left, right, upper and lower border."""
        rows, columns = ((k - f) // 2 for k, f in zip(self.kernel, self.factor, strict=True))
        return columns, columns, rows, rows


def _blur(maps: Tensor) -> Tensor:
    """A light blur of (B, 1, H, W); the border is repeated, so that constants stay."""
    taps = maps.new_tensor(_BLUR)
    taps = taps / taps.sum()
    padded = F.pad(maps, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps.view(1, 1, 5, 1)), taps.view(1, 1, 1, 5))


def low_size(maps: Tensor, factor: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the low-resolution grid.

    Raises:
        ValueError: the map holds no whole number of cells.
    """
    height, width = maps.shape[-2:]
    if height % factor[0] or width % factor[1]:
        raise ValueError(
            f"a map of {height} x {width} cells is no multiple of {factor[0]} x {factor[1]}"
        )
    return height // factor[0], width // factor[1]
