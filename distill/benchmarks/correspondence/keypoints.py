"""Semantic correspondence: keypoints of one object are matched with another of its category.

There is no head. The feature at the source keypoint (bilinear) is compared by cosine with every
cell of the target's map, including padding; the centre of the best cell is the match. PCK is the
share of keypoints whose match is at most `alpha` times the longer side of the target's box away
(Min et al., arXiv 1908.10543). As matches are centres of cells, errors are up to half a cell even
for perfect features; denser maps have smaller ones.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from data.errors import DataError
from data.labelled.files import read_rgb, read_size
from data.labelled.keypoint_survey import KeypointSurvey
from data.labelled.keypoints import AnyKeypoints, KeypointPair
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.correspondence.match_pictures import Matches, draw_matches
from distill.benchmarks.dense.dense_map import DenseMap, dense_map
from distill.benchmarks.map_points import cell_centres, encoder_size, sample_map
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher
from teachers.upsamplers.resize import Size2d, resize

SHOWN = 6  # pairs of the picture


class KeypointsConfig(BenchmarkConfig):
    """Matching of keypoints.

    Attributes:
        dataset: pairs of images with keypoints.
        size: of the encoder's input in pixels, one number or [height, width]; images are resized to
            fit and padded with white. `native` for each encoder's own.
        alpha: largest error of a correct match, as a share of the longer side of the target's box.
        batch_size: images of one forward pass.
    """

    kind: str = "keypoints"
    dataset: AnyKeypoints
    size: Size2d | Literal["native"] = (800, 800)
    alpha: PositiveFloat = 0.1
    batch_size: PositiveInt = 8


class PlacedImage(NamedTuple):
    """An image inside the encoder's input.

    Attributes:
        pixels: (3, H, W) in [0, 1], with white padding.
        scale: (2,) of x and y.
        offset: (2,) in pixels; a point p of the image lies at scale * p + offset.
    """

    pixels: Tensor
    scale: Tensor
    offset: Tensor


def place(image: Tensor, size: tuple[int, int]) -> PlacedImage:
    """Resizes an image to fit, keeping its aspect ratio, and centres it on white.

    Args:
        image: (3, H, W) in [0, 1].
        size: (height, width) of the result.
    """
    given = (image.shape[-2], image.shape[-1])
    ratio = min(wanted / side for wanted, side in zip(size, given, strict=True))
    height, width = (max(1, round(ratio * side)) for side in given)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = image.new_ones(3, *size)
    pixels[:, top : top + height, left : left + width] = resize(image[None], (height, width))[0]
    scale = torch.tensor([width / given[1], height / given[0]], dtype=torch.float64)
    return PlacedImage(pixels, scale, torch.tensor([left, top], dtype=torch.float64))


class Keypoints(Benchmark):
    """PCK of nearest neighbours.

    Metrics: `pck@0.1`, the share of all keypoints of all pairs, as in papers; its mean over
    categories; its value by difference of viewpoint, where the set has that; and the PCK of a
    baseline that predicts the same relative position in the target image.
    """

    Config = KeypointsConfig
    seeded = False

    def survey(self) -> Survey:
        """Points of all pairs."""
        return KeypointSurvey(self.config.dataset)

    def check(self, encoder: Teacher) -> None:
        """Checks the size; see `Benchmark.check`."""
        encoder_size(encoder.spec, self.config.size)

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Matches all pairs; see `Benchmark.measure`."""
        config: KeypointsConfig = self.config
        pairs = config.dataset.pairs()
        if not sum(len(pair.source_points) for pair in pairs):
            raise DataError(f"{config.dataset.root}: no keypoint is visible in two images")
        images = _Images(encoder, encoder_size(encoder.spec, config.size), config.batch_size)
        found, grid = _match(images, pairs)
        right = [_is_right(pair, at, config.alpha) for pair, at in zip(pairs, found, strict=True)]
        floor = _floor(pairs, config.alpha)
        if distributed.rank() == 0:
            shown = range(0, len(pairs), -(-len(pairs) // SHOWN))
            rows = [_picture(pairs[i], found[i], right[i]) for i in shown]
            draw_matches(folder / "matches.png", rows)
        protocol = {
            "pairs": len(pairs),
            "keypoints": sum(len(pair.source_points) for pair in pairs),
            "categories": len({pair.category for pair in pairs}),
            "input_px": list(images.size),
            "grid": list(grid),
            "padding": "white, centred; its cells can be matched",
        }
        return Measurement(_metrics(pairs, right, floor, config.alpha), protocol)


class _Images:
    """Encodes files, batch by batch."""

    def __init__(self, encoder: Teacher, size: tuple[int, int], batch_size: int) -> None:
        self.size = size
        self.encoder, self._batch_size = encoder, batch_size

    def encode(self, paths: Sequence[Path], what: str) -> Iterator[tuple[PlacedImage, DenseMap]]:
        """The placement of each image in the input, and its map (D, h, w)."""
        starts = range(0, len(paths), self._batch_size)
        for start in tracked(starts, what):
            read = [self._read(path) for path in paths[start : start + self._batch_size]]
            pixels = torch.stack([placed.pixels for placed in read])
            maps, covers = dense_map(self.encoder, pixels)
            yield from zip(read, (DenseMap(m, covers) for m in maps), strict=True)

    def _read(self, path: Path) -> PlacedImage:
        image = torch.tensor(read_rgb(path), device=self.encoder.mean.device)
        return place(scale_pixels(image.permute(2, 0, 1)), self.size)


def _match(
    images: _Images, pairs: Sequence[KeypointPair]
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """The matches of each pair's points, (N, 2) in pixels of the target; and the grid."""
    wanted = _source_points(pairs)
    vectors = _source_vectors(images, wanted)
    row = {path: number for number, path in enumerate(wanted)}
    targets: dict[Path, list[int]] = {}
    for number, pair in enumerate(pairs):
        targets.setdefault(pair.target, []).append(number)
    own = [list(targets)[i] for i in own_share(len(targets))]
    found: dict[int, np.ndarray] = {}
    grid: tuple[int, int] | None = None
    for path, (placed, (features, covers)) in zip(own, images.encode(own, "matching"), strict=True):
        grid = (features.shape[-2], features.shape[-1])
        cells = F.normalize(features.flatten(1), dim=0)
        centres = (cell_centres(grid, covers) - placed.offset) / placed.scale
        for number in targets[path]:
            pair = pairs[number]
            at = [wanted[pair.source][tuple(p)] for p in pair.source_points.tolist()]
            best = (vectors[row[pair.source], at] @ cells).argmax(1)
            found[number] = centres[best.cpu()].numpy()
    shares = distributed.gather_objects((found, grid))
    everywhere = {number: at for share, _ in shares for number, at in share.items()}
    grids = [each for _, each in shares if each is not None]
    return [everywhere[number] for number in range(len(pairs))], grids[0]


def _source_points(pairs: Sequence[KeypointPair]) -> dict[Path, dict[tuple[float, ...], int]]:
    """The distinct points of each source image, with their numbers."""
    wanted: dict[Path, dict[tuple[float, ...], int]] = {}
    for pair in pairs:
        points = wanted.setdefault(pair.source, {})
        for point in pair.source_points.tolist():
            points.setdefault(tuple(point), len(points))
    return wanted


def _source_vectors(images: _Images, wanted: dict[Path, dict[tuple[float, ...], int]]) -> Tensor:
    """Unit features of all source points, (images, most points of one, D); padded with zeros."""
    paths, most = list(wanted), max(len(points) for points in wanted.values())
    own = [paths[i] for i in own_share(len(paths))]
    encoder = images.encoder
    vectors = torch.zeros(len(own), most, encoder.spec.spatial_dim, device=encoder.mean.device)
    encoded = images.encode(own, "keypoints")
    for number, (path, (placed, (features, covers))) in enumerate(zip(own, encoded, strict=True)):
        points = torch.tensor(list(wanted[path]), dtype=torch.float64).reshape(-1, 2)
        inside = (points * placed.scale + placed.offset).to(features.device)
        sampled = sample_map(features, covers, inside, "bilinear")
        vectors[number, : len(points)] = F.normalize(sampled, dim=1)
    return gather_shares(vectors, len(paths))


def _is_right(pair: KeypointPair, found: np.ndarray, alpha: float) -> np.ndarray:
    errors = np.linalg.norm(found - pair.target_points, axis=1)
    return np.asarray(errors <= alpha * pair.extent_px)


def _floor(pairs: Sequence[KeypointPair], alpha: float) -> list[np.ndarray]:
    """Whether the same relative position in the target would be correct."""
    paths = {path for pair in pairs for path in (pair.source, pair.target)}
    sizes = {path: np.array(read_size(path)[::-1]) for path in paths}
    same = [pair.source_points * sizes[pair.target] / sizes[pair.source] for pair in pairs]
    return [_is_right(pair, at, alpha) for pair, at in zip(pairs, same, strict=True)]


def _picture(pair: KeypointPair, found: np.ndarray, right: np.ndarray) -> Matches:
    images = (read_rgb(pair.source), read_rgb(pair.target))
    return Matches(images, pair.source_points, found, right)


def _metrics(
    pairs: Sequence[KeypointPair],
    right: Sequence[np.ndarray],
    floor: Sequence[np.ndarray],
    alpha: float,
) -> dict[str, float]:
    name = f"pck@{alpha:g}"
    by_category: dict[str, list[np.ndarray]] = {}
    by_viewpoint: dict[int, list[np.ndarray]] = {}
    for pair, each in zip(pairs, right, strict=True):
        by_category.setdefault(pair.category, []).append(each)
        if pair.viewpoint is not None:
            by_viewpoint.setdefault(pair.viewpoint, []).append(each)
    means = [_percent(each) for each in by_category.values() if sum(map(len, each))]
    metrics = {name: _percent(right), f"{name}_class_mean": float(np.mean(means))}
    for viewpoint, group in sorted(by_viewpoint.items()):
        if sum(map(len, group)):
            metrics[f"{name}_viewpoint_{viewpoint}"] = _percent(group)
    return metrics | {f"{name}_same_position": _percent(floor)}


def _percent(right: Sequence[np.ndarray]) -> float:
    return 100 * float(np.concatenate(right).mean())
