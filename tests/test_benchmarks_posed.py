"""Geometric correspondence: true poses, slow references, figures of frames that are the same."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.labelled.posed import Frame, FrameFiles
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.correspondence.posed import (
    angle_deg,
    carry,
    choose_pairs,
    errors,
    frame_points,
    geometry,
    match,
)
from distill.evaluation.models import Pixels, PixelsConfig
from tests.ranks import run_on_ranks

HEIGHT, WIDTH, FOCAL = 32, 48, 585.0


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_frame(folder: Path, number: int, image: np.ndarray, pose: np.ndarray) -> None:
    """A frame that looks at a wall two metres ahead."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"frame-{number:06d}"
    Image.fromarray(image).save(stem.with_suffix(".color.png"))
    depth = np.full(image.shape[:2], 2000, dtype=np.uint16)
    Image.fromarray(depth).save(stem.with_suffix(".depth.png"))
    np.savetxt(stem.with_suffix(".pose.txt"), pose)


def turn(axis: str, degrees: float, shift: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    pose = np.eye(4)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    pose[i, i] = pose[j, j] = cosine
    pose[i, j], pose[j, i] = -sine, sine
    pose[:3, 3] = shift
    return pose


def measure(root: Path, folder: Path, **options: object) -> Measurement:
    entry = {"kind": "posed", "dataset": {"kind": "seven_scenes", "root": str(root)}}
    benchmark = build_benchmark(
        parse_benchmark({**entry, "size": [HEIGHT, WIDTH], "stride": 4, **options})
    )
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(HEIGHT, WIDTH)))
    return benchmark.measure(encoder, 0, folder)


def write_shifted(root: Path, columns: int) -> None:
    """A camera that moves to the right along a wall, by whole pixels."""
    wall = noise(HEIGHT, WIDTH + columns)
    write_frame(root / "seq", 0, wall[:, :WIDTH], np.eye(4))
    moved = turn("z", 0, (columns * 2.0 / FOCAL, 0, 0))
    write_frame(root / "seq", 1, wall[:, columns:], moved)


def test_the_same_frame_twice_has_a_recall_of_100(tmp_path: Path) -> None:
    for number in range(2):
        write_frame(tmp_path / "seq", number, noise(HEIGHT, WIDTH), np.eye(4))
    figures, protocol = measure(tmp_path, tmp_path)
    assert next(iter(figures)) == "mean_recall_cm"
    assert len(figures) == 8
    assert set(figures.values()) == {100.0}
    assert protocol["pairs"] == {"0-30": 1}
    assert protocol["covisible_percent"] == 100
    assert protocol["pose_residual_m"] == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "matches.png").is_file()


def test_a_known_motion_is_found_and_its_opposite_is_not(tmp_path: Path) -> None:
    """Eight of 48 columns leave the frame; the best 60 of 96 points are all still there."""
    write_shifted(tmp_path, 8)
    assert set(measure(tmp_path, tmp_path, matches=60).metrics.values()) == {100.0}
    path = tmp_path / "seq" / "frame-000001.pose.txt"
    pose = np.loadtxt(path)
    pose[0, 3] *= -1
    np.savetxt(path, pose)
    figures = measure(tmp_path, tmp_path, matches=60).metrics
    # Sixteen pixels, 5.5 cm at two metres, are too many for all but 25 and 50 px.
    assert figures["recall@5_cm"] == figures["recall@5_px"] == 0
    assert figures["recall@25_px"] == figures["recall@50_px"] == 100


@pytest.mark.process
def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    for number in range(4):
        write_frame(tmp_path / "seq", number, noise(HEIGHT, WIDTH, number // 2), np.eye(4))
    due = measured_on_ranks(str(tmp_path))
    assert due["recall@1_cm"] < 100
    assert run_on_ranks(2, measured_on_ranks, str(tmp_path)) == [due, due]


def measured_on_ranks(root: str) -> dict[str, float]:
    return measure(Path(root), Path(root)).metrics


def test_recall_is_told_apart_by_rotation(tmp_path: Path) -> None:
    """The first two frames are the same; the third has turned, and its picture is another."""
    image = noise(HEIGHT, WIDTH)
    write_frame(tmp_path / "seq", 0, image, np.eye(4))
    write_frame(tmp_path / "seq", 1, image, np.eye(4))
    write_frame(tmp_path / "seq", 2, noise(HEIGHT, WIDTH, 1), turn("y", 45))
    figures, protocol = measure(tmp_path, tmp_path)
    assert protocol["pairs"] == {"0-30": 1, "30-60": 2}
    assert figures["mean_recall_cm_0-30_deg"] == 100
    assert figures["mean_recall_cm_30-60_deg"] == 0
    assert figures["mean_recall_cm"] == pytest.approx(100 / 3)


def test_frames_that_all_look_elsewhere_are_refused(tmp_path: Path) -> None:
    write_frame(tmp_path / "seq", 0, noise(8, 8), np.eye(4))
    write_frame(tmp_path / "seq", 1, noise(8, 8), turn("y", 150))
    with pytest.raises(DataError, match="no two frames are less than 120 degrees apart"):
        measure(tmp_path, tmp_path)


def test_a_frame_without_depth_is_refused() -> None:
    frame = Frame(noise(8, 8), np.zeros((8, 8)), np.eye(3), np.eye(4))
    with pytest.raises(DataError, match="a frame of 8 x 8 px: expected 2 points with depth, got 0"):
        frame_points(frame, Pixels(PixelsConfig(patch_size=4)), (8, 8), 4)


@pytest.mark.parametrize("axis, degrees", [("x", 29.0), ("y", 75.0), ("z", 119.0)])
def test_angles_are_those_that_poses_turn_by(axis: str, degrees: float) -> None:
    other = turn("y", 50)
    assert angle_deg(other, other @ turn(axis, degrees)) == pytest.approx(degrees)


def test_pairs_are_spread_over_each_bin_and_beyond_120_degrees_none_counts() -> None:
    views = [FrameFiles(Path("i"), Path("d"), turn("z", angle + 0.5), 1.0) for angle in range(180)]
    origin = FrameFiles(Path("i"), Path("d"), np.eye(4), 1.0)
    candidates = [(origin, view) for view in views]
    chosen = choose_pairs(candidates, 3)
    assert [number for number, _ in chosen] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]
    assert [place for _, place in chosen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [number for number, _ in choose_pairs(candidates, None)] == list(range(120))


def slow_matches(first: Tensor, second: Tensor, count: int) -> list[tuple[int, int]]:
    """Every distance in Python's floats, sorted."""
    found = []
    for i, one in enumerate(first.double().tolist()):
        distances = [
            1 - math.fsum(a * b for a, b in zip(one, other, strict=True))
            for other in second.double().tolist()
        ]
        best, next_best = sorted(distances)[:2]
        found.append((1 - best / next_best, i, distances.index(best)))
    return [(i, j) for _, i, j in sorted(found, reverse=True)[:count]]


def test_matches_are_those_of_a_slow_search() -> None:
    generator = torch.Generator().manual_seed(0)
    first = F.normalize(torch.randn(30, 5, generator=generator), dim=1)
    second = F.normalize(torch.randn(20, 5, generator=generator), dim=1)
    a, b = match(first, second, 12)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == slow_matches(first, second, 12)


def test_a_point_that_looks_like_two_others_counts_least() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    nearly = F.normalize(torch.tensor([0.2, 1.0]), dim=0)
    first = torch.stack([east, nearly])  # the east is in the second frame, but twice
    a, b = match(first, torch.stack([east, east, north]), 1)
    assert (a.tolist(), b.tolist()) == ([1], [2])


def test_points_are_carried_as_a_slow_projection_has_it() -> None:
    intrinsics = np.array([[50.0, 0, 24], [0, 60, 16], [0, 0, 1]])
    blank = (noise(HEIGHT, WIDTH), np.ones((HEIGHT, WIDTH)))
    first = Frame(*blank, intrinsics, turn("y", 20, (0.1, 0.2, 0.3)))
    second = Frame(*blank, intrinsics, turn("x", -30, (-0.2, 0.0, 0.1)))
    xyz = torch.tensor([[0.1, 0.2, 2.0], [-0.3, 0.1, 1.5], [0.0, 0.0, -2.0]]).double()
    moved, pixels = carry(xyz, first, second)
    for point, came, at in zip(xyz.numpy(), moved.numpy(), pixels.numpy(), strict=True):
        world = first.pose[:3, :3] @ point + first.pose[:3, 3]
        due = second.pose[:3, :3].T @ (world - second.pose[:3, 3])
        assert np.allclose(came, due)
        if due[2] > 0:
            assert np.allclose(at, [50 * due[0] / due[2] + 24, 60 * due[1] / due[2] + 16])
        else:
            assert np.isinf(at).all()


def test_a_points_features_are_those_under_it() -> None:
    """Two colours that meet in the middle: a shift by half a cell would blur the border."""
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[:, 8:] = 255
    intrinsics = np.array([[10.0, 0, 8], [0, 10, 8], [0, 0, 1]])
    frame = Frame(image, np.full((16, 16), 2.0), intrinsics, np.eye(4))
    encoder = Pixels(PixelsConfig(patch_size=1, resolution=(16, 16)))
    points = frame_points(frame, encoder, (16, 16), 1)
    signs = points.features.sign()[:, 0].view(16, 16)
    assert (signs[:, :8] == -1).all()
    assert (signs[:, 8:] == 1).all()
    assert points.pixels[0].tolist() == [0.5, 0.5]
    assert points.xyz[0].tolist() == pytest.approx([-1.5, -1.5, 2.0])


def test_the_residual_is_how_far_depths_disagree() -> None:
    """The second camera is half a metre nearer to the wall, whose depth is 3 cm too large there."""
    intrinsics = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    first = Frame(noise(HEIGHT, WIDTH), np.full((HEIGHT, WIDTH), 2.0), intrinsics, np.eye(4))
    second = first._replace(
        depth=np.full((HEIGHT, WIDTH), 1.53), pose=turn("z", 0, (0.0, 0.0, 0.5))
    )
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(HEIGHT, WIDTH)))
    a, b = (frame_points(frame, encoder, (HEIGHT, WIDTH), 4) for frame in (first, second))
    share, residual = geometry(a, b)
    assert residual == pytest.approx(0.03)
    # What lies within three quarters of the frame around its centre stays in view.
    rows = sum(abs(y + 0.5 - HEIGHT / 2) < 0.75 * HEIGHT / 2 for y in range(2, HEIGHT, 4))
    columns = sum(abs(x + 0.5 - WIDTH / 2) < 0.75 * WIDTH / 2 for x in range(2, WIDTH, 4))
    assert share == pytest.approx(rows * columns / (HEIGHT * WIDTH / 16))
    metres, _ = errors(a, a, (torch.arange(3), torch.arange(3)))
    assert metres.tolist() == [0, 0, 0]
