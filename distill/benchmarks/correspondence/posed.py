"""Geometric correspondence: points of one frame are matched with another frame of the same scene.

The protocol is that of Probe3D (arXiv 2404.08636), without any head. Features are interpolated
(bicubic) at every fourth pixel with depth. The match of a point is its nearest neighbour by cosine
distance d = 1 - cos in the other frame, weighted by 1 - d1 / d2 of the two nearest. The 1,000
matches of largest weight count: the true pose moves their points into the other frame, where they
are compared with the matched points.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from data.batch import scale_pixels
from data.errors import DataError
from data.labelled.posed import AnyPosed, Frame, FrameFiles
from data.labelled.posed_survey import PosedSurvey
from data.labelled.survey import Survey
from distill.benchmarks.benchmark import Benchmark, BenchmarkConfig, Measurement
from distill.benchmarks.correspondence.match_pictures import Matches, draw_matches
from distill.benchmarks.dense.dense_map import dense_map
from distill.benchmarks.map_points import encoder_size, sample_map
from distill.benchmarks.sharing import gather_shares, own_share
from distill.runtime import distributed
from distill.runtime.progress import tracked
from teachers.teacher import Teacher
from teachers.upsamplers.resize import Size2d, resize

BINS_DEG = (0, 30, 60, 90, 120)
METRES, PIXELS = (0.01, 0.02, 0.05), (5, 25, 50)
SHOWN = 40  # matches of a pair in the picture
_ROWS = 1024  # points that are compared at once; bounds memory
_OCCLUDED_M = 0.05  # points farther than this from the other frame's depth are hidden there


class PosedConfig(BenchmarkConfig):
    """Matching of posed frames.

    Attributes:
        dataset: pairs of frames with depth and pose.
        size: of the encoder's input in pixels, one number or [height, width]; frames are resized to
            it without keeping their aspect ratio. `native` for each encoder's own.
        stride: pixels of a frame between points.
        matches: of each pair that count, those of largest weight.
        pairs_per_bin: pairs of each bin of rotation, evenly spaced in the set's; None for all.
    """

    kind: str = "posed"
    dataset: AnyPosed
    size: Size2d | Literal["native"] = "native"
    stride: PositiveInt = 4
    matches: PositiveInt = 1000
    pairs_per_bin: PositiveInt | None = None


class Points(NamedTuple):
    """The points of a frame.

    Attributes:
        features: (N, D) of unit length.
        pixels: (N, 2) float64, as x, y in pixels of the frame.
        xyz: (N, 3) float64 in metres, in the camera's axes.
        frame: of the points.
    """

    features: Tensor
    pixels: Tensor
    xyz: Tensor
    frame: Frame


class Posed(Benchmark):
    """Recall of nearest neighbours under the true pose.

    Metrics, all means over pairs: recall at 1, 2 and 5 cm in space and at 5, 25 and 50 px in the
    second frame; `mean_recall_cm`, the mean of the three in space, of all pairs and by the angle
    between the cameras.
    """

    Config = PosedConfig
    seeded = False

    def survey(self) -> Survey:
        """Depth of all frames that are matched."""
        config: PosedConfig = self.config
        return PosedSurvey(config.dataset, self._chosen()[1], config.stride)

    def check(self, encoder: Teacher) -> None:
        """Checks the size; see `Benchmark.check`."""
        encoder_size(encoder.spec, self.config.size)

    def _chosen(self) -> tuple[list[tuple[int, int]], list[tuple[FrameFiles, FrameFiles]]]:
        """The pairs that count: their numbers, see `choose_pairs`, and their files."""
        config: PosedConfig = self.config
        candidates = config.dataset.pairs()
        chosen = choose_pairs(candidates, config.pairs_per_bin)
        if not chosen:
            raise DataError(
                f"{config.dataset.root}: no two frames are less than {BINS_DEG[-1]} degrees apart"
            )
        return chosen, [candidates[number] for number, _ in chosen]

    def measure(self, encoder: Teacher, seed: int, folder: Path) -> Measurement:
        """Matches all pairs; see `Benchmark.measure`."""
        config: PosedConfig = self.config
        chosen, pairs = self._chosen()
        size = encoder_size(encoder.spec, config.size)

        @lru_cache(maxsize=4)  # consecutive pairs share their first frame
        def points(files: FrameFiles) -> Points:
            return frame_points(config.dataset.load(files), encoder, size, config.stride)

        own = own_share(len(pairs))
        rows = [
            _pair_row(points(pairs[i][0]), points(pairs[i][1]), config.matches)
            for i in tracked(own, "matching")
        ]
        columns = len(METRES) + len(PIXELS) + 2
        own_rows = torch.tensor(rows, dtype=torch.float64, device=encoder.mean.device)
        table = gather_shares(own_rows.view(-1, columns), len(pairs)).cpu()
        if distributed.rank() == 0:
            shown = {number: pair for (_, number), pair in zip(chosen, pairs, strict=True)}
            pictures = [_picture(points(a), points(b), config.matches) for a, b in shown.values()]
            draw_matches(folder / "matches.png", pictures)
        bins = [number for _, number in chosen]
        counts = {_bin_name(number): bins.count(number) for number in sorted(set(bins))}
        residual = float(table[:, 7].nanmedian())
        protocol = {
            "pairs": counts,
            "input_px": list(size),
            "points": "every stride-th pixel with depth, both frames; one-sided",
            "covisible_percent": 100 * float(table[:, 6].mean()),
            "pose_residual_m": residual if math.isfinite(residual) else None,
        }
        return Measurement(_metrics(table[:, :6], bins), protocol)


def choose_pairs(
    candidates: Sequence[tuple[FrameFiles, FrameFiles]], pairs_per_bin: int | None
) -> list[tuple[int, int]]:
    """The pairs that count, in order: the number of a candidate, and of its bin in `BINS_DEG`."""
    members: list[list[int]] = [[] for _ in BINS_DEG[:-1]]
    for number, (first, second) in enumerate(candidates):
        place = int(np.searchsorted(BINS_DEG, angle_deg(first.pose, second.pose), "right")) - 1
        if place < len(members):
            members[place].append(number)
    chosen = []
    for place, numbers in enumerate(members):
        count = min(len(numbers), pairs_per_bin or len(numbers))
        chosen += [(numbers[i * len(numbers) // count], place) for i in range(count)]
    return sorted(chosen)


def angle_deg(first: np.ndarray, second: np.ndarray) -> float:
    """Degrees between the orientations of two poses (4, 4)."""
    cosine = (np.trace(first[:3, :3].T @ second[:3, :3]) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def frame_points(frame: Frame, encoder: Teacher, size: tuple[int, int], stride: int) -> Points:
    """Features and positions of a frame's points.

    Args:
        frame: with depth at two points or more.
        encoder: frozen.
        size: (height, width) in pixels of the encoder's input.
        stride: pixels between points.

    Raises:
        DataError: fewer than two points have depth.
    """
    device = encoder.mean.device
    height, width = frame.depth.shape
    rows, columns = (np.arange(stride // 2, side, stride) for side in (height, width))
    depth = frame.depth[np.ix_(rows, columns)]
    row, column = np.nonzero(depth > 0)
    if len(row) < 2:
        raise DataError(
            f"a frame of {height} x {width} px: expected 2 points with depth, got {len(row)}"
        )
    pixels = np.stack([columns[column], rows[row]], 1) + 0.5
    rays = np.c_[pixels, np.ones(len(row))] @ np.linalg.inv(frame.intrinsics).T
    image = scale_pixels(torch.tensor(frame.image, device=device).permute(2, 0, 1)[None])
    maps, covers = dense_map(encoder, resize(image, size))
    places = torch.tensor(pixels, device=device)
    scale = places.new_tensor((size[1] / width, size[0] / height))
    features = F.normalize(sample_map(maps[0], covers, places * scale, "bicubic"), dim=1)
    xyz = torch.tensor(rays * depth[row, column][:, None], device=device)
    return Points(features, places, xyz, frame)


def match(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest neighbours of largest weight 1 - d1 / d2.

    Args:
        first: (N, D) of unit length.
        second: (M, D) of unit length, M of 2 or more.
        count: of matches.

    Returns:
        Their numbers in `first` and in `second`, by decreasing weight.
    """
    tops = [(rows @ second.T).topk(2) for rows in first.split(_ROWS)]
    distance = (1 - torch.cat([top.values for top in tops])).clamp(min=0)
    nearest = torch.cat([top.indices for top in tops])[:, 0]
    one, two = distance.unbind(1)
    weight = torch.where(two > 0, 1 - one / two.clamp(min=1e-30), 0)
    kept = weight.argsort(descending=True, stable=True)[:count]
    return kept, nearest[kept]


def errors(first: Points, second: Points, matches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The errors of matches in metres and in pixels of the second frame, each (count,)."""
    a, b = matches
    xyz, pixels = carry(first.xyz[a], first.frame, second.frame)
    return (xyz - second.xyz[b]).norm(dim=1), (pixels - second.pixels[b]).norm(dim=1)


def carry(xyz: Tensor, first: Frame, second: Frame) -> tuple[Tensor, Tensor]:
    """Points of one camera, (N, 3) in metres, in the axes of the other and in its pixels, (N, 2).

    Pixels of points behind the camera are infinite.
    """
    motion = torch.tensor(np.linalg.inv(second.pose) @ first.pose, device=xyz.device)
    moved = xyz @ motion[:3, :3].T + motion[:3, 3]
    homogeneous = moved @ torch.tensor(second.intrinsics, device=xyz.device).T
    ahead = moved[:, 2:] > 0
    pixels = homogeneous[:, :2] / homogeneous[:, 2:].where(ahead, 1.0)
    return moved, pixels.where(ahead, torch.inf)


def geometry(first: Points, second: Points) -> tuple[float, float]:
    """The agreement of two frames' depths under their poses.

    Returns:
        The share of the first frame's points that are visible in the second; and the median
        difference in metres between their depths in the second camera and its own depth there, NaN
        if no point falls on a pixel with depth.
    """
    moved, pixels = carry(first.xyz, first.frame, second.frame)
    depth = torch.tensor(second.frame.depth, device=moved.device)
    sides = pixels.new_tensor(depth.shape[::-1])
    inside = ((pixels >= 0) & (pixels < sides)).all(1)
    column, row = pixels[inside].long().unbind(1)
    seen = depth[row, column]
    residual = (moved[inside, 2] - seen)[seen > 0].abs()
    share = float((residual <= _OCCLUDED_M).sum()) / len(moved)
    return share, float(residual.median()) if len(residual) else float("nan")


def _pair_row(first: Points, second: Points, count: int) -> list[float]:
    """Six recalls as shares, and the results of `geometry`."""
    metres, pixels = errors(first, second, match(first.features, second.features, count))
    recalls = [float((metres <= limit).double().mean()) for limit in METRES]
    recalls += [float((pixels <= limit).double().mean()) for limit in PIXELS]
    return [*recalls, *geometry(first, second)]


def _metrics(recalls: Tensor, bins: Sequence[int]) -> dict[str, float]:
    names = [f"recall@{100 * limit:g}_cm" for limit in METRES]
    names += [f"recall@{limit}_px" for limit in PIXELS]
    mean = 100 * recalls[:, : len(METRES)].mean(1)
    metrics = {"mean_recall_cm": float(mean.mean())}
    metrics |= dict(zip(names, (100 * recalls.mean(0)).tolist(), strict=True))
    for number in sorted(set(bins)):
        of_bin = mean[torch.tensor(bins) == number]
        metrics[f"mean_recall_cm_{_bin_name(number)}_deg"] = float(of_bin.mean())
    return metrics


def _bin_name(number: int) -> str:
    return f"{BINS_DEG[number]}-{BINS_DEG[number + 1]}"


def _picture(first: Points, second: Points, count: int) -> Matches:
    a, b = match(first.features, second.features, count)
    a, b = (x[:: max(1, len(x) // SHOWN)][:SHOWN] for x in (a, b))
    metres, _ = errors(first, second, (a, b))
    return Matches(
        (first.frame.image, second.frame.image),
        first.pixels[a].cpu().numpy(),
        second.pixels[b].cpu().numpy(),
        (metres <= METRES[-1]).cpu().numpy(),
    )
