"""A detector on frozen maps: a feature pyramid and torchvision's FCOS heads.

The pyramid is ViTDet's (arXiv 2203.16527, section 3): all levels come from one map, by transposed
convolutions and pooling, without a top-down path. An encoder whose layers are a pyramid, as of a
CNN, gives each level from the layer of its stride. FCOS (arXiv 1904.01355) needs no anchor boxes
that fit the strides, and only one compiled operator, non-maximum suppression.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList

from distill.benchmarks.detection.average_precision import MAX_DETECTIONS
from distill.runtime import distributed
from teachers.teacher import Teacher
from teachers.torchvision_ops import allow_plain_nms

STRIDES = (4, 8, 16, 32)  # approximated by powers of two of the map's own stride
SCORE_THRESHOLD = 0.05  # torchvision's 0.2 removes detections that AP counts
NMS_THRESHOLD = 0.6


class Level(NamedTuple):
    """One level of the pyramid.

    Attributes:
        doublings: of the resolution of the encoder's map; negative for coarser levels.
        cell: (height, width) of a cell in pixels of the image.
        source: number of the encoder's layer that it is made of; None for the encoder's map.
    """

    doublings: int
    cell: tuple[float, float]
    source: int | None = None


def pyramid_levels(image: tuple[int, int], grid: tuple[int, int]) -> tuple[Level, ...]:
    """The levels for a map, by the pixels that each of its cells covers.

    Args:
        image: (H, W) in pixels, all of which the map covers.
        grid: (h, w) cells of the map.
    """
    height, width = image[0] / grid[0], image[1] / grid[1]
    side = math.sqrt(height * width)
    doublings = [round(math.log2(side / stride)) for stride in STRIDES]
    return tuple(Level(d, (height / 2.0**d, width / 2.0**d)) for d in doublings)


def levels_of(encoder: Teacher, image: tuple[int, int]) -> tuple[Level, ...]:
    """The levels for an encoder, each from the layer whose stride is nearest, else from its map."""
    if not encoder.strides:
        return pyramid_levels(image, encoder.spec.grid(*image))
    found = []
    for stride in STRIDES:
        away = [abs(math.log2(each / stride)) for each in encoder.strides]
        # Of layers of one stride the last, which has seen most.
        source = max(i for i, distance in enumerate(away) if distance == min(away))
        doublings = round(math.log2(encoder.strides[source] / stride))
        cell = encoder.strides[source] / 2.0**doublings
        found.append(Level(doublings, (cell, cell), source))
    return tuple(found)


def source_maps(encoder: Teacher, images: Tensor, levels: Sequence[Level]) -> list[Tensor]:
    """The maps that the levels are made of, one for each different source, from fine to coarse."""
    sources = sorted({level.source for level in levels if level.source is not None})
    return encoder.layers(images, sources) if sources else [encoder(images).spatial]


class Pyramid(nn.Module):
    """Maps of several strides, computed from one map.

    Args:
        mean: (D,) of the map's channels, which are standardised first, as the scales and offsets of
            encoders differ a thousandfold.
        deviation: (D,) standard deviations of the channels.
        levels: from fine to coarse.
        channels: of every level.
    """

    mean: Tensor  # (1, D, 1, 1)
    deviation: Tensor  # (1, D, 1, 1)

    def __init__(
        self, mean: Tensor, deviation: Tensor, levels: Sequence[Level], channels: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("deviation", deviation.float().view(1, -1, 1, 1))
        self.levels = nn.ModuleList(
            _level(len(mean), level.doublings, channels) for level in levels
        )

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Maps (B, D, h, w) to one for each level, (B, channels, 2^d h, 2^d w) after d doublings.

        Halves of odd sides are rounded up: the last cell reaches beyond the image.
        """
        standard = (maps - self.mean) / self.deviation.clamp(min=1e-6)
        return [level(standard) for level in self.levels]


class LayerPyramid(nn.Module):
    """Maps of several strides, each computed from a layer of its own.

    Args:
        statistics: mean and standard deviation (D,) of the channels of each source, see `Pyramid`.
        levels: from fine to coarse, with their sources.
        channels: of every level.
    """

    def __init__(
        self,
        statistics: Sequence[tuple[Tensor, Tensor]],
        levels: Sequence[Level],
        channels: int,
    ) -> None:
        super().__init__()
        sources = sorted({level.source for level in levels if level.source is not None})
        self._places = [sources.index(level.source) for level in levels if level.source is not None]
        self.parts = nn.ModuleList(
            Pyramid(*statistics[place], [level], channels)
            for place, level in zip(self._places, levels, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What `source_maps` returns to one map (B, channels, h, w) for each level."""
        return [part(maps[place])[0] for part, place in zip(self.parts, self._places, strict=True)]


def _level(dim: int, doublings: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
    for i in range(doublings):
        if i:
            layers += [LayerNorm2d(dim), nn.GELU()]
        narrower = max(channels, dim // 2)
        layers.append(nn.ConvTranspose2d(dim, narrower, 2, 2, bias=False))
        dim = narrower
    layers += [nn.Conv2d(dim, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)


class FrozenBackbone(nn.Module):
    """The frozen encoder and the pyramid on its map or its layers: FCOS's backbone."""

    def __init__(
        self,
        encoder: Teacher,
        pyramid: Pyramid | LayerPyramid,
        channels: int,
        levels: Sequence[Level],
    ) -> None:
        super().__init__()
        self.encoder, self.pyramid, self.out_channels = encoder, pyramid, channels
        self._levels = tuple(levels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1] to the levels by number."""
        maps = source_maps(self.encoder, images, self._levels)
        levels = self.pyramid(maps if isinstance(self.pyramid, LayerPyramid) else maps[0])
        return OrderedDict((str(i), level) for i, level in enumerate(levels))


class CellAnchors(AnchorGenerator):
    """One box for each cell: the cell itself.

    torchvision's own generator rounds strides to whole pixels, which those of levels over 14 px
    patches are not, and places the centre of a cell on its corner.

    Args:
        levels: of the pyramid.
    """

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__(sizes=((1,),) * len(levels), aspect_ratios=((1.0,),) * len(levels))
        self.cells = [level.cell for level in levels]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The boxes (N, 4) of all levels' cells, row by row, for each image."""
        boxes = []
        for (height, width), level in zip(self.cells, feature_maps, strict=True):
            h, w = level.shape[-2:]
            y, x = torch.meshgrid(
                torch.arange(h, device=level.device) * height,
                torch.arange(w, device=level.device) * width,
                indexing="ij",
            )
            boxes.append(torch.stack([x, y, x + width, y + height], -1).view(-1, 4))
        return [torch.cat(boxes)] * len(image_list.image_sizes)


class SharedHead(FCOSHead):
    """FCOS's heads, with a loss for batches that are shared by ranks.

    FCOS divides by the number of cells that have an object. Here this is the number on all ranks,
    so that the sums of the ranks' losses and gradients are those of the whole batch.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """This rank's part of the losses; see `FCOSHead.compute_loss`."""
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        own = torch.stack([(matched >= 0).sum() for matched in matched_idxs]).sum().double()
        share = own.clamp(min=1) / distributed.all_reduce(own.clone()).clamp(min=1)
        return {name: loss * share.float() for name, loss in losses.items()}


def build_detector(
    encoder: Teacher,
    statistics: Sequence[tuple[Tensor, Tensor]],
    *,
    size: tuple[int, int],
    num_classes: int,
    channels: int,
    seed: int,
) -> FCOS:
    """Builds an FCOS on an encoder, on the encoder's device.

    Args:
        encoder: frozen.
        statistics: mean and standard deviation (D,) of the channels of each of `source_maps`.
        size: (height, width) in pixels of all images.
        num_classes: K, numbered from 0; FCOS has no background class.
        channels: of the pyramid and of the heads, a multiple of 32, the groups of their GroupNorm.
        seed: of the initial weights.
    """
    allow_plain_nms()
    levels = levels_of(encoder, size)
    statistics = [(mean.cpu(), deviation.cpu()) for mean, deviation in statistics]
    # Built on the CPU, whose generator gives the same weights on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pyramid: Pyramid | LayerPyramid
        if encoder.strides:
            pyramid = LayerPyramid(statistics, levels, channels)
        else:
            pyramid = Pyramid(*statistics[0], levels, channels)
        detector = FCOS(
            FrozenBackbone(encoder, pyramid, channels, levels),
            num_classes,
            min_size=min(size),  # images have this size, so that FCOS does not resize them
            max_size=max(size),
            size_divisible=1,
            _skip_resize=True,  # else training draws a size from torch's default generator
            image_mean=[0.0] * 3,  # the encoder normalises pixels itself
            image_std=[1.0] * 3,
            anchor_generator=CellAnchors(levels),
            head=SharedHead(channels, 1, num_classes),
            score_thresh=SCORE_THRESHOLD,
            nms_thresh=NMS_THRESHOLD,
            detections_per_img=MAX_DETECTIONS,
        )
    return detector.to(encoder.mean.device)
