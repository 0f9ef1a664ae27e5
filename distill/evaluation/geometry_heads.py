"""From images to a head's prediction of each pixel: one map or four layers, and back to pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.evaluation.dense_map import dense_layers, dense_map, padded_size
from distill.evaluation.dpt import NUM_LAYERS, DPTHead
from distill.evaluation.geometry_config import DPTHeadConfig, GeometryConfig
from teachers.teacher import Teacher, even_layers
from teachers.upsamplers.resize import resize


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
