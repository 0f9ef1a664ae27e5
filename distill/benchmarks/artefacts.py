"""Artefacts of feature maps, measured without labels: a fixed pattern, and seams between tiles."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from data.images import load_images
from data.labelled.image_surveys import ImagesSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.dense.dense_map import dense_map, padded_size
from distill.benchmarks.map_points import encoder_size
from distill.benchmarks.seams import SeamRatio, seam_ratio
from distill.benchmarks.sharing import own_share
from distill.display.pictures import draw_side_by_side
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.resize import Factor, Size2d


class ArtefactsConfig(BenchmarkConfig):
    """Images, and the tiles between which seams are measured.

    Attributes:
        images: a folder, archive or shards of images, the more the better.
        size: of the encoder's input in pixels, one number or [height, width]; images are resized to
            cover it and centre cropped. `native` for each encoder's own.
        tiles: number of tiles along each axis: one number or [rows, columns]. None for the factor
            of the encoder's upsampler; without an upsampler there is no seam ratio.
        batch_size: images of one forward pass.
    """

    kind: str = "artefacts"
    images: Path
    size: Size2d | Literal["native"] = "native"
    tiles: Factor | None = None
    batch_size: PositiveInt = 8


class Artefacts(Benchmark):
    """Bias energy and seam ratio.

    Metrics: `bias_energy`, the variance over positions of the mean map of all images, as a share of
    the variance over images and positions; and `seam_ratio`, see `seams.seam_ratio`. For N
    unrelated images and an encoder without a pattern, the bias energy is about 1/N. Photographs
    have a pattern of their own, such as sky at the top, which mean colours (`kind: pixels`) show.
    """

    Config = ArtefactsConfig
    seeded = False
    lower_is_better = frozenset({"bias_energy", "seam_ratio"})

    def survey(self) -> Survey:
        """The images."""
        return ImagesSurvey(self.config.images)

    def check(self, encoder: Teacher) -> None:
        """Checks sizes and tiles; see `Benchmark.check`."""
        self._shapes(encoder)

    def _shapes(self, encoder: Teacher) -> tuple[tuple[int, int], ...]:
        """Size of the input, grid of the map, factor of the upsampler, and tiles."""
        config: ArtefactsConfig = self.config
        size = encoder_size(encoder.spec, config.size)
        factor = encoder.upsampler.factor if isinstance(encoder, UpsampledTeacher) else (1, 1)
        tiles = config.tiles or factor
        grid = encoder.spec.grid(*padded_size(encoder.spec, *size))
        if any(cells % count for cells, count in zip(grid, tiles, strict=True)):
            raise TeacherError(
                f"tiles: a map of {grid[0]} x {grid[1]} cells cannot be divided into {tiles[0]} x "
                f"{tiles[1]} equal tiles"
            )
        return size, grid, factor, tiles

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Encodes all images; see `Benchmark.measure`."""
        config: ArtefactsConfig = self.config
        size, grid, factor, tiles = self._shapes(encoder)
        images, _ = load_images(config.images, size)
        own = torch.tensor(list(own_share(len(images))), dtype=torch.long)
        empty = torch.zeros(encoder.spec.spatial_dim, *grid, dtype=torch.float64)
        moments, seams = _Moments(empty.to(encoder.mean.device)), SeamRatio(tiles, factor)
        parts = own.split(config.batch_size)
        for part in tracked(parts, "encoding"):
            pixels = scale_pixels(images[part], encoder.mean.device)
            maps = dense_map(encoder, pixels).features
            moments.add(maps)
            seams.add(maps)
        mean, energy = moments.finish(len(images))
        ratio = seam_ratio(distributed.all_reduce(seams.sums().to(encoder.mean.device)))
        if distributed.rank() == 0:
            draw_side_by_side(folder / "mean_map.png", [("mean of all maps", mean[None])])
        metrics = {"bias_energy": energy} | ({} if ratio is None else {"seam_ratio": ratio})
        protocol = {"images": len(images), "input_px": list(size), "grid": list(grid)}
        return Measurement(metrics, protocol | {"tiles": list(tiles)})


class _Moments:
    """Running sums of maps and of their squares.

    Args:
        empty: float64 zeros of a map's size, (D, h, w).
    """

    def __init__(self, empty: Tensor) -> None:
        self._maps, self._squares = empty, empty.new_zeros(())

    def add(self, maps: Tensor) -> None:
        """Adds maps (B, D, h, w)."""
        self._maps = self._maps + maps.double().sum(0)
        self._squares = self._squares + maps.double().square().sum()

    def finish(self, count: int) -> tuple[Tensor, float]:
        """The mean map of the `count` images of all ranks, (D, h, w), and the bias energy.

        Raises:
            RuntimeError: the maps are not finite, or all constant.
        """
        mean = distributed.all_reduce(self._maps) / count
        squares = distributed.all_reduce(self._squares) / (count * mean[0].numel())
        centre = mean.mean((1, 2))
        total = float(squares - centre.square().sum())
        bias = float((mean - centre[:, None, None]).square().mean((1, 2)).sum())
        if not total > 0 or not torch.isfinite(squares):
            raise RuntimeError("bias energy: the maps are constant or not finite")
        return mean, bias / total
