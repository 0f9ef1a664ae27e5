"""What the student and each teacher see of an image, and where their maps show the same place.

A teacher's fixed pattern stands at fixed positions. A student that sees the same crop learns it
along; where the crops are displaced it is noise, and averages out (C-RADIOv4, arXiv 2601.17237).
Displacements by whole tokens are compared as integer slices, which is exact. Other warps go through
homographies; they interpolate the target, which has no gradient, so that the backward pass is
deterministic on GPUs too. The student's heads run on its own grid before any of this, because
attention and normalisation do not commute with interpolation.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

from distill.objective.losses import match_grids
from teachers.upsamplers.views import (
    ViewsConfig,
    sample_homographies,
    valid_mask,
    warp,
    warp_images,
)


class ShiftConfig(BaseModel):
    """Every teacher's crop, and that of the averaged student, moves by whole tokens.

    Attributes:
        std: in tokens, along each axis and for each image: a shift is round(N(0, std)). With the
            published 0.5 (NVlabs/RADIO issue 181) 68 % of shifts are 0, and 16 % 1 to either side.
        limit: the largest shift in tokens; a longer one is none. Images are loaded larger than
            the student's by so many tokens on every side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shift"]
    std: PositiveFloat = 0.5
    limit: PositiveInt = 2


class WarpConfig(ViewsConfig):
    """The student sees a warped image and the teachers the image itself.

    The defaults are those of NVIDIA TAO's full equivariance, which does not zoom.

    Attributes:
        flip: share of images that are mirrored left to right.
    """

    kind: Literal["homography"]
    num_views: Literal[1] = 1
    zoom: Annotated[float, Field(ge=1, le=4)] = 1.0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.1


EquivarianceConfig = Annotated[ShiftConfig | WarpConfig, Field(discriminator="kind")]


class Pair(NamedTuple):
    """The same places in a prediction and in a target.

    Attributes:
        prediction: (B, D, a, b); a and b may be zero.
        target: (B, D, a, b).
    """

    prediction: Tensor
    target: Tensor


class Views(ABC):
    """One micro-batch as its readers see it.

    Attributes:
        student: (B, 3, H, W) what the student sees.
    """

    student: Tensor

    @abstractmethod
    def of(self, reader: str) -> Tensor:
        """What a teacher sees, (B, 3, H, W)."""

    @abstractmethod
    def pairs(self, reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """Where the student's map (B, D, h, w) and a teacher's (B, D, h', w') show the same.

        Returns:
            One pair for the whole batch, or one an image, in order.
        """


class SameViews(Views):
    """Everyone sees the same; maps meet at the smaller grid."""

    def __init__(self, images: Tensor) -> None:
        self.student = images

    def of(self, reader: str) -> Tensor:
        """The images."""
        return self.student

    def pairs(self, reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """Both maps on their common grid."""
        return [Pair(*match_grids(prediction, target))]


class ShiftedViews(Views):
    """Crops of one frame: the student's in its middle, each reader's some tokens beside it.

    Args:
        frames: (B, 3, H + 2 m, W + 2 m) with a margin m of `limit` patches.
        config: the law of the shifts.
        patch: pixels of a token.
        readers: whose crops to draw.
        generator: on the CPU.
    """

    def __init__(
        self,
        frames: Tensor,
        config: ShiftConfig,
        patch: int,
        readers: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        self._frames, self._patch, self._margin = frames, patch, config.limit
        drawn = torch.randn(len(readers), len(frames), 2, generator=generator) * config.std
        drawn = drawn.round().int()
        drawn[drawn.abs() > config.limit] = 0
        self.shifts = dict(zip(readers, drawn.tolist(), strict=True))
        self.student = central_crop(config, frames, patch)
        self._tokens = tuple(side // patch for side in self.student.shape[-2:])

    def of(self, reader: str) -> Tensor:
        """The reader's crop of every frame."""
        crops = []
        for frame, shift in zip(self._frames, self.shifts[reader], strict=True):
            top, left = (self._patch * (self._margin + d) for d in shift)
            height, width = self.student.shape[-2:]
            crops.append(frame[:, top : top + height, left : left + width])
        return torch.stack(crops)

    def pairs(self, reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """Integer slices, an image each.

        Where a map's grid is no whole multiple of the student's tokens, as with a teacher of one
        size, a token's shift is a fraction of a cell, and the target is interpolated.
        """
        shifts = self.shifts[reader]
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
        """From the student's crops to the reader's, (B, 3, 3)."""
        moves = torch.eye(3, dtype=torch.float64).repeat(len(shifts), 1, 1)
        sides = torch.tensor(self._tokens, dtype=torch.float64)
        moves[:, :2, 2] = (-2 * torch.tensor(shifts, dtype=torch.float64) / sides).flip(1)
        return moves


class WarpedViews(Views):
    """The student sees each image through a homography of its own, the others as it is.

    Args:
        images: (B, 3, H, W).
        config: the ranges.
        patch: pixels of a token.
        generator: on the CPU.
    """

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

    def of(self, reader: str) -> Tensor:
        """The images."""
        return self._images

    def pairs(self, reader: str, prediction: Tensor, target: Tensor) -> list[Pair]:
        """The student's cells whose centre lies inside the image, an image each."""
        return _warped_pairs(prediction, target, self.homographies)


def frame_size(
    config: EquivarianceConfig | None, resolution: tuple[int, int], patch: int
) -> tuple[int, int]:
    """The size in pixels at which images are loaded, for students of a resolution."""
    margin = 2 * config.limit * patch if isinstance(config, ShiftConfig) else 0
    return resolution[0] + margin, resolution[1] + margin


def central_crop(config: EquivarianceConfig | None, images: Tensor, patch: int) -> Tensor:
    """The student's part of images of `frame_size`, where it is not warped."""
    if not isinstance(config, ShiftConfig):
        return images
    margin = config.limit * patch
    return images[..., margin:-margin, margin:-margin]


def build_views(
    config: EquivarianceConfig | None,
    images: Tensor,
    patch: int,
    readers: Sequence[str],
    generator: torch.Generator,
) -> Views:
    """Draws what everyone sees of a micro-batch.

    Args:
        config: how views differ; None: not at all.
        images: (B, 3, H, W) in [0, 1], of `frame_size`.
        patch: the student's, in pixels.
        readers: the teachers that are run, and whoever else is compared with the student.
        generator: on the CPU, so that every device draws the same.
    """
    if config is None:
        return SameViews(images)
    if isinstance(config, ShiftConfig):
        return ShiftedViews(images, config, patch, readers, generator)
    return WarpedViews(images, config, patch, generator)


def _overlap(maps: Tensor, shift: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The part of (1, D, h, w) that a map shifted by some tokens shows too."""
    rows, columns = (
        slice(max(0, d) * (side // t), side + min(0, d) * (side // t))
        for d, side, t in zip(shift, maps.shape[-2:], tokens, strict=True)
    )
    return maps[:, :, rows, columns]


def _warped_pairs(prediction: Tensor, target: Tensor, homographies: Tensor) -> list[Pair]:
    """The valid cells of each image, as (1, D, n, 1).

    Args:
        prediction: (B, D, h, w).
        target: (B, D, h', w').
        homographies: (B, 3, 3) from the prediction's frame to the target's, on the CPU.
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
