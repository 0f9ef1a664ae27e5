"""The strips that `local_attention` is computed in on a CPU, and their buffers.

A map is cut into strips of columns. In a strip with its halo, the keys that a row of queries needs
are consecutive rows, hence one matrix in memory; the matrices of consecutive rows of queries
overlap, which batched matrix products accept as a stride.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from teachers.upsamplers.precision import compute_dtype

_COLUMNS = 8  # measured on a CPU with AVX-512 for a 7 x 7 window: 6 and 12 are slower
_LOGITS_CPU = 1 << 20  # at once; they stay in a cache
_LOGITS = 1 << 26  # elsewhere: some hundred MB
LOG2_E = math.log2(math.e)


class Workspace:
    """Named buffers that all strips reuse: on a CPU, new memory takes a third of the time."""

    def __init__(self, x: Tensor) -> None:
        self._like, self._flat = x, dict[str, Tensor]()

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; overwrites the tensor taken under this name before."""
        count = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < count:
            self._flat[name] = self._like.new_empty(count, dtype=compute_dtype(self._like))
        return self._flat[name][:count].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The batched matrix product, in the buffer `name`."""
        return torch.bmm(a, b, out=self.take(name, *a.shape[:2], b.shape[2]))


@dataclass(frozen=True)
class Strip:
    """A strip of columns of some heads of some images, which is computed at once.

    Its buffers hold planes, one for each image and head, one below the other. A plane takes
    H = h + 2r rows: its own and a gap that no window of r rows up and down can cross. A buffer has
    2r rows more. Where the data start at row r of a buffer, the window of row i of the planes
    starts at row i of the buffer; where they start at row 2r, it ends there.
    """

    images: slice
    heads: slice
    columns: slice
    inside: slice  # columns of the strip and its halo inside the map
    before: int  # columns of the halo outside the map on the left
    after: int  # and on the right
    height: int
    radius: int
    space: Workspace

    @property
    def width(self) -> int:
        """Columns of the strip."""
        return self.columns.stop - self.columns.start

    @property
    def halo_width(self) -> int:
        """Columns of the strip and its halo."""
        return self.width + 2 * self.radius

    @property
    def sides(self) -> tuple[int, int, int]:
        """Images, heads and rows H of the planes."""
        images, heads = (s.stop - s.start for s in (self.images, self.heads))
        return images, heads, self.height + 2 * self.radius

    def own(self, name: str, x: Tensor) -> Tensor:
        """Copies the strip of (B, h, w, heads, d) to a buffer, from row 2r on; zero elsewhere."""
        columns = x[self.images, :, self.columns, self.heads]
        return self._buffer(name, columns, 2 * self.radius, 0, 0, 0.0)

    def around(self, name: str, x: Tensor, outside: float = 0.0) -> Tensor:
        """Copies the strip and its halo to a buffer, from row r on; `outside` elsewhere."""
        columns = x[self.images, :, self.inside, self.heads]
        return self._buffer(name, columns, self.radius, self.before, self.after, outside)

    def _buffer(
        self, name: str, x: Tensor, first: int, before: int, after: int, outside: float
    ) -> Tensor:
        rows, width = math.prod(self.sides), before + x.shape[2] + after
        buffer = self.space.take(name, rows + 2 * self.radius, width, x.shape[4])
        buffer[:first] = outside
        buffer[first + rows :] = outside
        planes = self.planes(buffer[first : first + rows])
        planes[:, :, self.height :] = outside
        planes[:, :, :, :before] = outside
        planes[:, :, :, width - after :] = outside
        planes[:, :, : self.height, before : width - after] = x.permute(0, 3, 1, 2, 4)
        return buffer

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Writes a result, (all rows of all planes, width, d), to (B, h, w, heads, d)."""
        target = target[self.images, :, self.columns, self.heads]
        target.copy_(self.planes(rows)[:, :, : self.height].permute(0, 2, 3, 1, 4))

    def planes(self, rows: Tensor) -> Tensor:
        """Views (all rows of all planes, ...) as (images, heads, H, ...)."""
        return rows.unflatten(0, self.sides)

    def windows(self, buffer: Tensor) -> Tensor:
        """Views each row of a buffer with the 2r rows below, (rows, (2r + 1) * width, d)."""
        _, width, dim = buffer.shape
        size = (math.prod(self.sides), (2 * self.radius + 1) * width, dim)
        return buffer.as_strided(size, (width * dim, dim, 1))

    def bias(self, slopes: Tensor) -> Tensor:
        """ALiBi to base 2 between strip and halo, -inf beyond the window.

        The same whether the halo holds keys or queries.

        Returns:
            (heads, 1, width, (2r + 1) * halo width).
        """
        slopes = slopes[self.heads] * LOG2_E
        rows = torch.arange(-self.radius, self.radius + 1, device=slopes.device).abs()
        columns = torch.arange(-self.radius, self.width + self.radius, device=slopes.device)
        columns = (columns - columns[self.radius : self.radius + self.width, None]).abs()
        parity = torch.arange(self.heads.start, self.heads.stop, device=slopes.device) % 2
        along_rows = (slopes * (1 - parity))[:, None, None, None] * rows[:, None]
        along_columns = (slopes * parity)[:, None, None, None] * columns[:, None]
        bias = -(along_rows + along_columns)
        return bias.masked_fill_((columns > self.radius)[:, None], -torch.inf).flatten(2)[:, None]

    def mask_border(self, logits: Tensor) -> None:
        """Writes -inf to (images, heads, H, width, keys) where keys lie outside the map."""
        logits = logits.unflatten(-1, (2 * self.radius + 1, self.halo_width))
        for i in range(min(self.radius, self.height)):
            logits[:, :, i, :, : self.radius - i] = -torch.inf
            logits[:, :, self.height - 1 - i, :, self.radius + 1 + i :] = -torch.inf
        logits[..., : self.before] = -torch.inf
        logits[..., self.halo_width - self.after :] = -torch.inf


def strips(q: Tensor, radius: int) -> Iterator[Strip]:
    """Cuts (B, h, w, heads, d) into strips that have few enough logits, or a single head."""
    batch, h, w, heads, _ = q.shape
    space = Workspace(q)
    plane = (h + 2 * radius) * _COLUMNS * (2 * radius + 1) * (_COLUMNS + 2 * radius)
    most = _LOGITS_CPU if q.device.type == "cpu" else _LOGITS
    groups = math.ceil(heads / max(most // plane, 1))
    num_heads = math.ceil(heads / groups)
    num_images = min(max(most // (plane * heads), 1), batch)
    for left, image, head in product(
        range(0, w, _COLUMNS), range(0, batch, num_images), range(0, heads, num_heads)
    ):
        right = min(left + _COLUMNS, w)
        inside = slice(max(left - radius, 0), min(right + radius, w))
        yield Strip(
            images=slice(image, min(image + num_images, batch)),
            heads=slice(head, min(head + num_heads, heads)),
            columns=slice(left, right),
            inside=inside,
            before=inside.start - (left - radius),
            after=right + radius - inside.stop,
            height=h,
            radius=radius,
            space=space,
        )
