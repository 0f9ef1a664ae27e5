"""The grid of a timm network that is no plain ViT: how many cells, and where they are.

Found by a pass without storage, as strides round in different ways, and from the padding of the
filters with a stride.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers.conv2d_same import Conv2dSame, Conv2dSameExport
from timm.layers.pool2d_same import MaxPool2dSame
from torch import nn
from torch.nn.modules.utils import _pair

from teachers.errors import TeacherError
from teachers.features import FeatureSpec, Padding
from teachers.weights import without_storage

_SAME = (Conv2dSame, Conv2dSameExport, MaxPool2dSame)
Size = tuple[int, int]


def measured(
    network: Any, spec: FeatureSpec, features: Literal["norm"] | int, model: str
) -> FeatureSpec:
    """The spec with the grid of the network, see `FeatureSpec.native_grid` and `padding`.

    Args:
        network: without its classifier.
        spec: as if cells tiled the image.
        features: as in `TimmConfig`.
        model: its name, for messages.

    Raises:
        TeacherError: the network has no such map.
    """
    grid = _counter(network, features)
    try:
        native = grid(*spec.resolution)
    except AssertionError as error:  # timm raises it for features that a model lacks
        raise TeacherError(
            f"features: {features} of {model!r}: {error}; choose the number of a "
            "stage, -1 for the last"
        ) from None
    except (NotImplementedError, RuntimeError):
        return spec  # some models cannot run without storage; `Teacher.forward` checks the grid
    if spec.any_resolution:
        padded = replace(spec, padding=padding_of(network))
        if padded.padding and _fits(grid, padded):
            spec = padded
    whole = (spec.resolution[0] // spec.patch_size, spec.resolution[1] // spec.patch_size)
    if native == whole:
        return spec
    free = spec.any_resolution and (spec.padding is not None or _takes_multiples(grid, spec))
    return replace(spec, native_grid=native, any_resolution=free)


def padding_of(network: nn.Module) -> Padding | None:
    """How a CNN pads, where all of its filters with a stride do it in one way; else None."""
    found = {_padding(module) for module in network.modules() if _has_stride(module)}
    if found == {"same"}:
        return "same"
    return "symmetric" if found == {"symmetric"} else None


def _has_stride(module: nn.Module) -> bool:
    filters = isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))
    return filters and max(_pair(module.stride)) > 1


def _padding(module: Any) -> Padding | None:
    """That of one filter; None if its place is known no better than by an even division."""
    kernel = _pair(module.kernel_size)
    if isinstance(module, nn.AvgPool2d) or any(side % 2 == 0 for side in kernel):
        return None
    if _pair(module.dilation) != (1, 1) or _pair(module.stride) != (2, 2):
        return None
    if isinstance(module, _SAME):
        return "same" if min(kernel) > 1 else None
    centred = module.padding != "same" and _pair(module.padding) == tuple(k // 2 for k in kernel)
    return "symmetric" if centred and not getattr(module, "ceil_mode", False) else None


def _counter(network: Any, features: Literal["norm"] | int) -> Callable[[int, int], Size]:
    """From the size of images to the grid of their map."""
    empty = without_storage(network)
    normed = features == "norm"

    def grid(height: int, width: int) -> Size:
        with torch.no_grad():
            images = torch.empty(2, 3, height, width, device="meta")
            maps = empty.forward_intermediates(
                images,
                indices=[-1 if normed else features],
                norm=normed,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        return maps[0].shape[2], maps[0].shape[3]

    return grid


def _fits(grid: Callable[[int, int], Size], spec: FeatureSpec) -> bool:
    """Whether the network makes the cells that its padding promises, of odd and even sizes."""
    patch = spec.patch_size
    sizes = [(2 * patch, 3 * patch), (2 * patch + 1, 3 * patch - 1), spec.resolution]
    try:
        return all(grid(*size) == spec.grid(*size) for size in sizes)
    except (AssertionError, NotImplementedError, RuntimeError):
        return False


def _takes_multiples(grid: Callable[[int, int], Size], spec: FeatureSpec) -> bool:
    patch = spec.patch_size
    height, width = (-(-side // patch) * patch for side in spec.resolution)
    try:
        return grid(height, width) == (height // patch, width // patch)
    except (AssertionError, NotImplementedError, RuntimeError):
        return False  # only the native size is known to work
