"""From images to a head's prediction of each pixel: one map or four layers, and back to pixels."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from data.labelled.depth import AnyDepth
from data.labelled.depth_files import Window
from distill.benchmarks.benchmark import BenchmarkConfig
from distill.benchmarks.dense.dense_map import dense_layers, dense_map, padded_size
from distill.benchmarks.dense.dpt import NUM_LAYERS, DPTHead
from distill.benchmarks.dense.probe_training import ProbeConfig
from teachers.teacher import Teacher, even_layers
from teachers.upsamplers.resize import Size2d, resize


class LinearHeadConfig(BaseModel):
    """BatchNorm and a 1 x 1 convolution on the encoder's map."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["linear"]


class DPTHeadConfig(BaseModel):
    """A DPT on four layers; an encoder that shows none, an upsampled one say, cannot have it.

    Attributes:
        hidden_dim: channels of the head.
        layers: numbers of the four; None for the last ones of four even parts of the encoder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dpt"]
    hidden_dim: PositiveInt = 256
    layers: Annotated[tuple[NonNegativeInt, ...], Field(min_length=4, max_length=4)] | None = None


class GeometryInput(BaseModel):
    """What an encoder gets to see.

    Attributes:
        size: (height, width) in pixels that images, of training and of test, are resized to;
            `native` for the encoder's own resolution; None for images as they are.
        window: the part of training images that is trained on; None for all of them.
        crop: (height, width) in pixels of the random crops of that part, on-line; None for none.
        flip: whether half of the training images are mirrored, on-line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size2d | Literal["native"] | None = None
    window: Window | None = None
    crop: Size2d | None = None
    flip: bool = True


class GeometryConfig(BenchmarkConfig):
    """A probe of depth or of normals.

    Attributes:
        dataset: where it lies, and in which layout.
        input: what the encoder sees.
        probe: how the head is trained.
        head: `linear` on the last map or `dpt` on four layers.
        loss_stride: the loss is taken at every n-th pixel along both axes.
        counted: the part of test images that counts, such as Eigen's crop; None for all of them.
        labels: (height, width) that the truth of test images is resized to before it is counted;
            None for its own size.
        flip_average: whether predictions are means of the image's and its mirror image's.
    """

    dataset: AnyDepth
    input: GeometryInput = GeometryInput()
    probe: ProbeConfig
    head: Annotated[LinearHeadConfig | DPTHeadConfig, Field(discriminator="kind")]
    loss_stride: PositiveInt = 1
    counted: Window | None = None
    labels: Size2d | None = None
    flip_average: bool = False


class LinearHead(nn.Module):
    """BatchNorm and a 1 x 1 convolution.

    Args:
        dim: channels of the map.
        out_dim: channels of the result.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, out_dim, 1)
        nn.init.normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, D, h, w) to (B, out_dim, h, w)."""
        return self.project(self.norm(maps))


class Reader:
    """Maps of an encoder as a head wants them.

    Args:
        encoder: the frozen one.
        config: of the head and the input.
    """

    def __init__(self, encoder: Teacher, config: GeometryConfig) -> None:
        self.encoder = encoder
        self.layers: tuple[int, ...] | None = None
        if isinstance(config.head, DPTHeadConfig):
            self.layers = config.head.layers or even_layers(encoder.num_layers, NUM_LAYERS)
        size = config.input.size
        self.size = encoder.spec.resolution if size == "native" else size

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """The maps of images (B, 3, H, W) in [0, 1], which have their input size."""
        if self.layers is None:
            return (dense_map(self.encoder, images).features,)
        return tuple(dense_layers(self.encoder, images, self.layers))

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) at its input size."""
        return image if self.size is None else resize(image[None], self.size)[0]

    def on_pixels(
        self, maps: Tensor, seen: tuple[int, int], size: tuple[int, int], stride: int = 1
    ) -> Tensor:
        """Predictions of cells, brought to pixels.

        Args:
            maps: (B, K, h, w).
            seen: (height, width) of the images that were encoded.
            size: (H, W) that is wanted.
            stride: every n-th of these pixels only, from n // 2 on; the others cost nothing.

        Returns:
            (B, K, H, W), bilinear with half-pixel centres, without what covered padding.
        """
        covers = padded_size(self.encoder.spec, *seen)
        rows, columns = (
            _weights(maps, *lengths)[stride // 2 :: stride]
            for lengths in zip(maps.shape[-2:], covers, seen, size, strict=True)
        )
        return rows @ maps @ columns.T


def _weights(like: Tensor, cells: int, covers: int, seen: int, size: int) -> Tensor:
    """What each cell of a line counts for each pixel of it, (size, cells)."""
    unit = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    for length, kept in ((covers, seen), (size, size)):
        unit = F.interpolate(unit, length, mode="linear", align_corners=False)[..., :kept]
    return unit[0].T


def build_head(config: GeometryConfig, dims: Sequence[int], out_dim: int) -> nn.Module:
    """The head that a config asks for, on maps of `dims` channels."""
    if isinstance(config.head, DPTHeadConfig):
        return DPTHead(dims, out_dim, config.head.hidden_dim)
    return LinearHead(dims[0], out_dim)
