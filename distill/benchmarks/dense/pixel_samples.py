"""Preparation of images with label maps: resizing, crops, augmentation, windows.

Labels move with their pixels and take the nearest value, so that no new class appears. The
augmentation is mmsegmentation's for ADE20K, as in the linear probes of DINO and RADIO: random
scale, a crop in which no class covers more than three quarters, flip, photometric distortion.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, ValidationError, model_validator
from torch import Tensor

from data.batch import scale_pixels
from data.labelled.files import IGNORED
from data.labelled.survey import Finding, Size, one_size
from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.features import FeatureSpec
from teachers.upsamplers.resize import Size2d, resize
from teachers.validation import explain

# Labels (C, H, W), the ratio they were enlarged by, and whether they were mirrored, to labels.
Adapt = Callable[[Tensor, float, bool], Tensor]
Unknown = Tensor | int  # labels of unknown pixels: one number, or (C, 1, 1)

_MOST_OF_ONE_CLASS = 0.75
_TRIES = 10


class LabelledPixels(NamedTuple):
    """One image and its labels.

    Attributes:
        image: (3, H, W) in [0, 1].
        labels: (C, H, W) of one or several tasks. Crops look at the first channel, as classes.
    """

    image: Tensor
    labels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[-2], self.image.shape[-1]


class InputConfig(StrictConfig):
    """The input of an encoder; `native` is the encoder's own resolution.

    Attributes:
        size: (height, width) in pixels that images are resized to; the aspect ratio is not kept.
        short_side: pixels that the shorter side is resized to; the aspect ratio is kept. Without
            `size` and `short_side` images are not resized.
        crop: (height, width) in pixels of training crops; None for whole images.
        stride: pixels between sliding windows of size `crop` in test images, at most `crop`; None
            for whole images.
        scale: smallest and largest factor of the random resize before a crop.
        flip: whether half of the training images are mirrored.
        photometric: whether brightness, contrast, saturation and hue are changed at random.
    """

    size: Size2d | Literal["native"] | None = None
    short_side: PositiveInt | None = None
    crop: Size2d | Literal["native"] | None = None
    stride: Size2d | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    flip: bool = True
    photometric: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.size is not None and self.short_side is not None:
            raise ValueError("size and short_side: set only one of them")
        if self.stride is not None and self.crop is None:
            raise ValueError("stride: needs crop, the size of the windows")
        if self.stride is not None and isinstance(self.crop, tuple) and _gaps(self):
            raise ValueError(
                f"stride: expected at most crop, {list(self.crop)}, got {list(self.stride)}: no "
                "window would cover the pixels between, which then have no prediction"
            )
        if self.crop is None and self.scale != (1.0, 1.0):
            raise ValueError("scale: needs crop, as the images of a batch must have one size")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: expected [smallest, largest], got {list(self.scale)}")
        return self

    def resolved(self, spec: FeatureSpec) -> "ResolvedInput":
        """This config with the encoder's own resolution in place of `native`.

        Raises:
            TeacherError: it does not fit together with that resolution.
        """
        native = {
            key: spec.resolution for key in ("size", "crop") if getattr(self, key) == "native"
        }
        try:
            return ResolvedInput.model_validate(self.model_dump() | native)
        except ValidationError as error:
            lines = explain(error, ResolvedInput)
            raise TeacherError("; ".join(f"input.{line}" for line in lines)) from None


def _gaps(config: InputConfig) -> bool:
    """Whether windows leave pixels out."""
    assert config.stride is not None
    assert isinstance(config.crop, tuple)
    return any(step > side for step, side in zip(config.stride, config.crop, strict=True))


class ResolvedInput(InputConfig):
    """An `InputConfig` for one encoder."""

    size: Size2d | None
    crop: Size2d | None


def image_tensor(image: np.ndarray) -> Tensor:
    """An image as layouts read it, uint8 (H, W, 3), as (3, H, W) in [0, 1]."""
    # torch.tensor copies: the array may be read-only.
    return scale_pixels(torch.tensor(image).permute(2, 0, 1))


def resized(pixels: LabelledPixels, size: tuple[int, int]) -> LabelledPixels:
    """Resizes both: the image with antialias, the labels to the nearest value."""
    return LabelledPixels(resize(pixels.image[None], size)[0], nearest(pixels.labels, size))


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (C, H, W) resized to the nearest value."""
    return F.interpolate(labels[None], size, mode="nearest-exact")[0]


def input_size(config: InputConfig, height: int, width: int) -> tuple[int, int]:
    """The (height, width) in pixels that an image of this size is resized to."""
    if isinstance(config.size, tuple):
        return config.size
    if config.short_side is None:
        return height, width
    ratio = config.short_side / min(height, width)
    return round(height * ratio), round(width * ratio)


def judge_sizes(config: InputConfig, sizes: Mapping[str, Sequence[Size]]) -> list[Finding]:
    """An error where training images would reach the encoder in several sizes."""
    if config.crop is not None or config.size is not None:
        return []
    return one_size(
        [input_size(config, *size) for size in sizes["train"]], "input.size or input.crop"
    )


def unchanged(labels: Tensor, ratio: float, mirrored: bool) -> Tensor:
    """The labels as they are: moving an image does not change classes."""
    return labels


def augmented(
    pixels: LabelledPixels,
    config: ResolvedInput,
    generator: torch.Generator,
    adapt: Adapt = unchanged,
    unknown: Unknown = IGNORED,
) -> LabelledPixels:
    """Augments an image that has its input size.

    Args:
        pixels: the image and its labels.
        config: of the augmentation.
        generator: of the random numbers.
        adapt: adapts the values of moved labels, see `PixelTask.adapt`.
        unknown: the labels of padding.
    """
    ratio, mirrored = 1.0, False
    if config.crop is not None:
        ratio = _between(*config.scale, generator)
        height, width = pixels.size
        size = max(1, round(height * ratio)), max(1, round(width * ratio))
        pixels = _varied_crop(
            padded(resized(pixels, size), config.crop, unknown), config.crop, generator
        )
    if config.flip and _between(0, 1, generator) < 0.5:
        mirrored = True
        pixels = LabelledPixels(pixels.image.flip(-1), pixels.labels.flip(-1))
    pixels = pixels._replace(labels=adapt(pixels.labels, ratio, mirrored))
    if config.photometric:
        pixels = pixels._replace(image=photometric(pixels.image, generator))
    return pixels


def padded(
    pixels: LabelledPixels, size: tuple[int, int], unknown: Unknown = IGNORED
) -> LabelledPixels:
    """Pads to at least `size` on the right and below: black pixels, unknown labels."""
    height, width = pixels.size
    rim = (0, max(0, size[1] - width), 0, max(0, size[0] - height))
    image, labels = F.pad(pixels.image, rim), pixels.labels
    canvas = labels.new_empty(*labels.shape[:-2], *image.shape[-2:])
    canvas[:] = unknown
    canvas[..., :height, :width] = labels
    return LabelledPixels(image, canvas)


def _varied_crop(
    pixels: LabelledPixels, size: tuple[int, int], generator: torch.Generator
) -> LabelledPixels:
    """A crop in which no class covers too much, if one of ten random crops is such."""
    height, width = pixels.size
    for _ in range(_TRIES):
        top = int(torch.randint(height - size[0] + 1, (), generator=generator))
        left = int(torch.randint(width - size[1] + 1, (), generator=generator))
        found = LabelledPixels(*(cut(each, (top, left), size) for each in pixels))
        classes = found.labels.view(-1, *size)[0]
        counts = classes[classes != IGNORED].long().bincount()
        if len(counts.nonzero()) > 1 and counts.max() < _MOST_OF_ONE_CLASS * counts.sum():
            break
    return found


def photometric(image: Tensor, generator: torch.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue, each with probability 0.5.

    Args:
        image: (3, H, W) in [0, 1].
        generator: of the random numbers.

    Returns:
        The same shape, in [0, 1].
    """
    from torchvision.transforms.v2 import functional as colours

    def changes() -> bool:
        return _between(0, 1, generator) < 0.5

    if changes():
        image = (image + _between(-32, 32, generator) / 255).clamp(0, 1)
    contrast_first = changes()
    if contrast_first and changes():
        image = (image * _between(0.5, 1.5, generator)).clamp(0, 1)
    if changes():
        image = colours.adjust_saturation(image, _between(0.5, 1.5, generator))
    if changes():
        image = colours.adjust_hue(image, _between(-18, 18, generator) / 180)
    if not contrast_first and changes():
        image = (image * _between(0.5, 1.5, generator)).clamp(0, 1)
    return image


def windows(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int]]:
    """The top left corners of windows that cover an image; the last ones are moved inside.

    Args:
        size: (height, width) of the image, at least `crop`.
        crop: (height, width) of a window.
        stride: between windows, along both axes.
    """
    tops, lefts = (
        list(dict.fromkeys(min(start, s - c) for start in range(0, max(1, s - c + step), step)))
        for s, c, step in zip(size, crop, stride, strict=True)
    )
    return [(top, left) for top in tops for left in lefts]


def cut(values: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A window of (..., H, W)."""
    return values[..., corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
