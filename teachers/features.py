"""The output of every encoder, `Features`, and its description, `FeatureSpec`.

Imports torch only, so that the student can use it without the teachers' libraries.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """The output of a teacher, an upsampled teacher or a student.

    Attributes:
        summary: (B, D_summary), one vector per image; None for an encoder without one.
        spatial: (B, D, h, w), a map, never a token list.
    """

    summary: Tensor | None
    spatial: Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """The shapes of an encoder's `Features` and the image sizes that it accepts.

    Attributes:
        summary_dim: channels of the summary; None where there is none.
        spatial_dim: channels of the map.
        patch_size: input pixels per grid cell, along both axes.
        resolution: (height, width) in pixels that the encoder was trained at.
        any_resolution: whether other multiples of `patch_size` are accepted too.
        native_grid: (h, w) cells at `resolution` where it is not `resolution // patch_size`: nine
            tiles of a 384 px SigLIP, 27 x 27 cells and 6 px unused each, make 81 x 81, not 82.
        spatial_from: where the map is taken, `last block, after the final norm`; empty if unknown.
        summary_from: the same for the summary.
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

    def accepts(self, height: int, width: int) -> bool:
        """Whether the encoder accepts images of (height, width) pixels."""
        sides = (height, width)
        # The general rule first: torch.export adds a guard for each comparison that is false.
        if self.any_resolution and all(s > 0 and s % self.patch_size == 0 for s in sides):
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
        return height // self.patch_size, width // self.patch_size
