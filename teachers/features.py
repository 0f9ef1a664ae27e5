"""The output of every encoder, `Features`, and its description, `FeatureSpec`.

Imports torch only, so that the student can use it without the teachers' libraries.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

# How a CNN pads before filters with a stride: TensorFlow's SAME, or evenly on both sides.
Padding = Literal["same", "symmetric"]


class Features(NamedTuple):
    """The output of a teacher, an upsampled teacher or a student.

    Attributes:
        summary: (B, D_summary), one vector per image; None for an encoder without one.
        spatial: (B, D, h, w), a map, never a token list.
    """

    summary: Tensor | None
    spatial: Tensor


class Frame(NamedTuple):
    """The rectangle that the cells of a map cover evenly, in pixels of the image.

    Of w cells, number x has its centre at `left + (x + 0.5) * width / w`; (0, 0) is the outer
    corner of the image's first pixel.

    Attributes:
        height: in pixels.
        width: in pixels.
        top: where it begins; negative above the image.
        left: the same, to the left.
    """

    height: float
    width: float
    top: float = 0
    left: float = 0


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The shapes of an encoder's `Features` and the image sizes that it accepts.

    Attributes:
        summary_dim: channels of the summary; None where there is none.
        spatial_dim: channels of the map.
        patch_size: input pixels per grid cell, along both axes.
        resolution: (height, width) in pixels that the encoder was trained at.
        any_resolution: whether other multiples of `patch_size` are accepted too; with `padding`
            all sizes.
        native_grid: (h, w) cells at `resolution` where it is not `resolution // patch_size`: nine
            tiles of a 384 px SigLIP, 27 x 27 cells and 6 px unused each, make 81 x 81, not 82.
        spatial_from: where the map is taken, `last block, after the final norm`; empty if unknown.
        summary_from: the same for the summary.
        padding: of a CNN that fills the last cell of a size that is no multiple of `patch_size`,
            which also says where its cells are, see `frame`; None for cells that tile the image.
    """

    summary_dim: int | None
    spatial_dim: int
    patch_size: int
    resolution: tuple[int, int]
    any_resolution: bool = False
    native_grid: tuple[int, int] | None = None
    # Not compared: they describe attributes of the encoder, which its fingerprint includes.
    spatial_from: str = field(default="", compare=False, repr=False)
    summary_from: str = field(default="", compare=False, repr=False)
    padding: Padding | None = field(default=None, compare=False, repr=False)

    def accepts(self, height: int, width: int) -> bool:
        """Whether the encoder accepts images of (height, width) pixels."""
        sides = (height, width)
        # The general rule first: torch.export adds a guard for each comparison that is false.
        if self.any_resolution and all(s > 0 and s % self.patch_size == 0 for s in sides):
            return True
        if self.any_resolution and self.padding is not None and min(sides) > 0:
            return True
        return sides == self.resolution

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The accepted (height, width) in pixels closest to the given one."""
        if self.accepts(height, width) or not self.any_resolution:
            return (height, width) if self.accepts(height, width) else self.resolution
        p = self.patch_size
        return max(p, round(height / p) * p), max(p, round(width / p) * p)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Cells (h, w) of the map for images of (height, width) pixels.

        Raises:
            ValueError: the encoder does not accept this size; names the nearest accepted one.
        """
        if not self.accepts(height, width):
            near = self.nearest(height, width)
            rule = (
                f"multiples of {self.patch_size} px"
                if self.any_resolution
                else f"{self.resolution[0]} x {self.resolution[1]} px only"
            )
            raise ValueError(
                f"images of {height} x {width} px: this encoder accepts {rule}; "
                f"the nearest size is {near[0]} x {near[1]} px"
            )
        if self.native_grid is not None and (height, width) == self.resolution:
            return self.native_grid
        if self.padding is not None:
            return -(-height // self.patch_size), -(-width // self.patch_size)
        return height // self.patch_size, width // self.patch_size

    def frame(self, height: int, width: int) -> Frame:
        """Where the cells of the map of images of (height, width) pixels are.

        A cell's place is the middle of the pixels that it depends on. Filters of odd size with a
        stride of 2 move it: PyTorch's symmetric padding centres the first cell on the first pixel,
        TensorFlow's SAME the last cell on the last pixel, and the others follow at `patch_size`.
        Of 256 px and a stride of 32 that is half a cell off an even division of the image.

        At a native size that is no multiple of `patch_size` (`native_grid`) the cells reach over
        both ends of the image, see only what is inside, and are taken to tile it: 9 cells for
        260 px, which by the rule above begin 12.5 px before it and end 15.5 px after it.

        Raises:
            ValueError: see `grid`.
        """
        cells = self.grid(height, width)
        native = self.native_grid is not None and (height, width) == self.resolution
        if self.padding is None or native:
            return Frame(height, width)
        rows, columns = (self._reach(*each) for each in zip(cells, (height, width), strict=True))
        return Frame(rows[1], columns[1], rows[0], columns[0])

    def _reach(self, cells: int, side: int) -> tuple[float, float]:
        """Begin and length in pixels, along one axis, of the cells of a CNN that pads."""
        length = cells * self.patch_size
        first = 0.5 if self.padding == "symmetric" else side - 0.5 - (length - self.patch_size)
        return first - self.patch_size / 2, length
