"""From a high-resolution map back to the encoder's grid; used only while an upsampler trains.

The attention downsampler of FeatUp (arXiv 2403.10516) and FeatSharp (arXiv 2502.16025), changed
where the public code is off: windows are centred on the cell they stand for, taps beyond the
border are left out rather than zero, and nothing is random.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from teachers.errors import TeacherError

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
        y, x = (_offsets(k) / f for f, k in zip(self.factor, self.kernel, strict=True))
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
        maps = maps if maps.dtype == torch.float64 else maps.float()
        low_size(maps, self.factor)
        with torch.autocast(maps.device.type, enabled=False):
            weights = self.weights(maps)
            return _WindowSum.apply(maps, weights, self.factor, self.kernel)  # type: ignore[no-any-return]

    def weights(self, maps: Tensor) -> Tensor:
        """The weight of every tap, (B, kh * kw, h, w); zero beyond the border, sum one."""
        # The projection goes first: it and the blur commute, and one channel is blurred, not D.
        logits = _blur(torch.einsum("bdhw,d->bhw", maps, self.logit)[:, None])
        (fh, fw), (kh, kw) = self.factor, self.kernel
        rows, columns = (kh - fh) // 2, (kw - fw) // 2
        padded = F.pad(logits, (columns, columns, rows, rows), value=-torch.inf)
        windows = padded[:, 0].unfold(1, kh, fh).unfold(2, kw, fw) + self.tap_bias
        return rearrange(windows, "b h w kh kw -> b (kh kw) h w").softmax(1)


class _WindowSum(torch.autograd.Function):
    """out[j, i] = sum over taps of weights[tap, j, i] * maps[fh j + dy, fw i + dx].

    A loop over taps, without a tensor of (D, kh * kw, h, w); written out backward as well, because
    autograd would make a full map of zeros for each tap's slice.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weights: Tensor, factor: tuple[int, int], kernel: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(maps, weights)
        ctx.factor, ctx.kernel = factor, kernel
        out = maps.new_zeros(*maps.shape[:2], *weights.shape[2:])
        for t, here, there in _taps(maps, factor, kernel):
            out[here].addcmul_(weights[:, t, None][here], _phases(maps, factor)[there])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        maps, weights = ctx.saved_tensors
        grad_maps = torch.zeros_like(maps, memory_format=torch.contiguous_format)
        grad_weights = torch.zeros_like(weights)
        for t, here, there in _taps(maps, ctx.factor, ctx.kernel):
            source = _phases(maps, ctx.factor)[there]
            _phases(grad_maps, ctx.factor)[there].addcmul_(weights[:, t, None][here], grad[here])
            grad_weights[:, t, None][here] = (source * grad[here]).sum(1, keepdim=True)
        return grad_maps, grad_weights, None, None


_Index = tuple[Any, ...]


def _taps(
    maps: Tensor, factor: tuple[int, int], kernel: tuple[int, int]
) -> Iterator[tuple[int, _Index, _Index]]:
    """Every tap: its number, the cells it has inside the map, and where it reads `_phases`."""
    sizes = low_size(maps, factor)
    rows, columns = (list(_axis(*axis)) for axis in zip(sizes, factor, kernel, strict=True))
    for dy, (here_y, there_y, phase_y) in enumerate(rows):
        for dx, (here_x, there_x, phase_x) in enumerate(columns):
            there = (..., there_y, phase_y, there_x, phase_x)
            yield dy * kernel[1] + dx, (..., here_y, here_x), there


def _axis(size: int, factor: int, kernel: int) -> Iterator[tuple[slice, slice, int]]:
    """Along one axis, for each tap: output cells, input cells, and the place in the input cell."""
    for tap in range(kernel):
        shift, phase = divmod(tap - (kernel - factor) // 2, factor)
        first = min(size, max(0, -shift))
        last = max(first, size - max(0, shift))  # no cell at all where the map is that small
        yield slice(first, last), slice(first + shift, last + shift), phase


def _phases(maps: Tensor, factor: tuple[int, int]) -> Tensor:
    """A view (B, D, h, fh, w, fw) of a map."""
    return maps.unflatten(3, (-1, factor[1])).unflatten(2, (-1, factor[0]))


def _offsets(kernel: int) -> Tensor:
    """Distance in cells of each tap from the centre of the low-resolution cell."""
    return torch.arange(kernel) - (kernel - 1) / 2


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
