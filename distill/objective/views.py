"""Views: what the student and each teacher see of an image, and which cells show the same place.

A teacher's fixed pattern stands at fixed positions. A student that sees the same crop learns the
pattern; if the crops are displaced, the pattern is noise and averages out (C-RADIOv4, arXiv
2601.17237). Displacements by whole tokens are compared by integer slices, which is exact. Other
warps are homographies; they interpolate the target, which has no gradient, so that the backward
pass is deterministic on GPUs too. The student's heads run on its own grid before any of this,
because attention and normalisation do not commute with interpolation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from distill.objective.losses import match_grids
from teachers.config import StrictConfig
from teachers.upsamplers.views import (
    ViewsConfig,
    sample_homographies,
    valid_mask,
    warp,
    warp_images,
)


class ShiftConfig(StrictConfig):
    """Moves the crop of every teacher, and that of the averaged student, by whole tokens.

    Attributes:
        std: in tokens, along each axis and for each image: a shift is round(N(0, std)). With the
            published 0.5 (NVlabs/RADIO issue 181) 68 % of shifts are 0, and 16 % 1 to either side.
        limit: the largest shift in tokens; larger ones are set to 0. Images are loaded larger than
            the student's input by this many tokens on every side.
    """

    kind: Literal["shift"]
    std: PositiveFloat = 0.5
    limit: PositiveInt = 2


class WarpConfig(ViewsConfig):
    """Shows the student a warped image, and the teachers the image itself.

    The defaults are those of full equivariance in NVIDIA TAO, which does not zoom.

    Attributes:
        flip: share of images that are mirrored left to right.
    """

    kind: Literal["homography"]
    num_views: Literal[1] = 1
    close_ups: Literal[0] = 0
    zoom: Annotated[float, Field(ge=1, le=4)] = 1.0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.1


EquivarianceConfig = Annotated[ShiftConfig | WarpConfig, Field(discriminator="kind")]


class Pair(NamedTuple):
    """The same places in a prediction and a target, both (B, D, a, b); a and b may be zero."""

    prediction: Tensor
    target: Tensor


Align = Callable[[str, Tensor, Tensor], list[Pair]]  # `Views.pairs`


class Views(ABC):
    """The views of one micro-batch.

    A consumer of views is a teacher, or the averaged student (`mesa.EMA`).

    Attributes:
        student: (B, 3, H, W) what the student sees.
    """

    student: Tensor

    @abstractmethod
    def of(self, consumer: str) -> Tensor:
        """What a consumer sees, (B, 3, H, W)."""

    @abstractmethod
    def pairs(self, consumer: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """Pairs the cells of the student's map with those of a consumer's at the same places.

        The maps are (B, D, h, w) and (B, D, h', w'). There is one pair for the whole batch, or one
        for each image, in order.
        """


class SameViews(Views):
    """Every consumer sees what the student sees; maps are resized to the smaller grid."""

    def __init__(self, images: Tensor) -> None:
        self.student = images

    def of(self, consumer: str) -> Tensor:
        """The images."""
        return self.student

    def pairs(self, consumer: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """Both maps on their common grid."""
        return [Pair(*match_grids(prediction, target))]


class ShiftedViews(Views):
    """Crops of larger images: the student's in the middle, each consumer's shifted by whole tokens.

    Args:
        frames: (B, 3, H + 2 m, W + 2 m) with a margin m of `limit` patches.
        config: the distribution of the shifts.
        patch: pixels of a token.
        consumers: whose shifts to draw.
        generator: on the CPU.
    """

    def __init__(
        self,
        frames: Tensor,
        config: ShiftConfig,
        patch: int,
        consumers: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        self._frames, self._patch, self._margin = frames, patch, config.limit
        drawn = torch.randn(len(consumers), len(frames), 2, generator=generator) * config.std
        drawn = drawn.round().int()
        drawn[drawn.abs() > config.limit] = 0
        self.shifts = dict(zip(consumers, drawn.tolist(), strict=True))
        self.student = central_crop(config, frames, patch)
        self._tokens = tuple(side // patch for side in self.student.shape[-2:])

    def of(self, consumer: str) -> Tensor:
        """The consumer's crop of every image."""
        crops = []
        for frame, shift in zip(self._frames, self.shifts[consumer], strict=True):
            top, left = (self._patch * (self._margin + d) for d in shift)
            height, width = self.student.shape[-2:]
            crops.append(frame[:, top : top + height, left : left + width])
        return torch.stack(crops)

    def pairs(self, consumer: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """One pair for each image, by integer slices.

        If a grid is no whole multiple of the student's tokens, as with a teacher of one size, a
        shift by a token is a fraction of a cell, and the target is interpolated.
        """
        shifts = self.shifts[consumer]
        grids = (prediction.shape[-2:], target.shape[-2:])
        if any(g % t for grid in grids for g, t in zip(grid, self._tokens, strict=True)):
            return _warped_pairs(prediction, target, self._homographies(shifts))
        return [
            Pair(
                *match_grids(
                    _overlap(x[None], shift, self._tokens),
                    _overlap(y[None], [-d for d in shift], self._tokens),
                )
            )
            for x, y, shift in zip(prediction.unbind(), target.unbind(), shifts, strict=True)
        ]

    def _homographies(self, shifts: Sequence[Sequence[int]]) -> Tensor:
        """From the student's crops to the consumer's, (B, 3, 3)."""
        moves = torch.eye(3, dtype=torch.float64).repeat(len(shifts), 1, 1)
        sides = torch.tensor(self._tokens, dtype=torch.float64)
        moves[:, :2, 2] = (-2 * torch.tensor(shifts, dtype=torch.float64) / sides).flip(1)
        return moves


class WarpedViews(Views):
    """The student sees each image (B, 3, H, W) through a random homography, consumers unchanged."""

    def __init__(
        self, images: Tensor, config: WarpConfig, patch: int, generator: torch.Generator
    ) -> None:
        height, width = images.shape[-2:]
        self._images = images
        grid = (height // patch, width // patch)
        drawn = sample_homographies(config, len(images), grid, generator)
        mirrored = torch.rand(len(images), generator=generator) < config.flip
        drawn[mirrored] @= torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
        self.homographies = drawn[:, 0]
        self.student = warp_images(images, drawn.to(images.device), (height, width))

    def of(self, consumer: str) -> Tensor:
        """The images."""
        return self._images

    def pairs(self, consumer: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """One pair for each image, of the student's cells whose centre lies inside the image."""
        return _warped_pairs(prediction, target, self.homographies)


def frame_size(
    config: EquivarianceConfig | None, resolution: tuple[int, int], patch: int
) -> tuple[int, int]:
    """The size in pixels at which images are loaded, for a student's input of a resolution."""
    margin = 2 * config.limit * patch if isinstance(config, ShiftConfig) else 0
    return resolution[0] + margin, resolution[1] + margin


def central_crop(config: EquivarianceConfig | None, images: Tensor, patch: int) -> Tensor:
    """The student's crop of images of `frame_size`; the images themselves without shifts."""
    if not isinstance(config, ShiftConfig):
        return images
    margin = config.limit * patch
    return images[..., margin:-margin, margin:-margin]


def build_views(
    config: EquivarianceConfig | None,
    images: Tensor,
    patch: int,
    consumers: Sequence[str],
    generator: torch.Generator,
) -> Views:
    """Draws the views of a micro-batch.

    Args:
        config: how views differ; None: not at all.
        images: (B, 3, H, W) in [0, 1], of `frame_size`.
        patch: the student's patch size in pixels.
        consumers: names of the teachers and, with MESA, of the averaged student.
        generator: on the CPU, so that every device draws the same.
    """
    if config is None:
        return SameViews(images)
    if isinstance(config, ShiftConfig):
        return ShiftedViews(images, config, patch, consumers, generator)
    return WarpedViews(images, config, patch, generator)


def _overlap(maps: Tensor, shift: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The cells of a map (1, D, h, w) that a map shifted by some tokens has too."""
    rows, columns = (
        slice(max(0, d) * (side // t), side + min(0, d) * (side // t))
        for d, side, t in zip(shift, maps.shape[-2:], tokens, strict=True)
    )
    return maps[:, :, rows, columns]


def _warped_pairs(prediction: Tensor, target: Tensor, homographies: Tensor) -> list[Pair]:
    """The valid cells of each image, as (1, D, n, 1).

    The homographies, (B, 3, 3) on the CPU, lead from the prediction's frame to the target's.
    """
    prediction, target = match_grids(prediction, target)
    size = (prediction.shape[-2], prediction.shape[-1])
    target = warp(target, homographies.to(target.device), size)
    masks = valid_mask(homographies, size).flatten(1)
    cells = [mask.nonzero()[:, 0].to(target.device) for mask in masks]
    return [
        Pair(*(m.flatten(1)[None, :, chosen, None] for m in maps))
        for *maps, chosen in zip(prediction.unbind(), target.unbind(), cells, strict=True)
    ]
