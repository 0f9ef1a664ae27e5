"""Normals: of analytic surfaces, the angles, the loss, and what a mirror does."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.labelled.depth import DepthSample, DepthView
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.dense.normal_scores import (
    angles,
    normal_scores,
    normal_sums,
    normals_of_depth,
)
from distill.benchmarks.dense.normals import Normals, angular_loss
from distill.evaluation.models import Pixels, PixelsConfig

FOCAL, CENTRE = 40.0, (17.0, 21.0)


def rays(height: int = 40, width: int = 44) -> Tensor:
    """Directions of pixel centres, (3, H, W), of depth one."""
    rows = (torch.arange(height).double() + 0.5 - CENTRE[0]) / FOCAL
    columns = (torch.arange(width).double() + 0.5 - CENTRE[1]) / FOCAL
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("normal", [(0, 0, -1), (0.3, 0, -1), (-0.2, 0.5, -1)])
def test_a_plane_has_one_normal(normal: tuple[float, float, float], step: int) -> None:
    due = torch.tensor(normal).double()
    due = due / due.norm()
    depth = -2 / (rays() * due[:, None, None]).sum(0)  # points p with p . n = -2
    came = normals_of_depth(depth, FOCAL, CENTRE, step)
    inner = came[:, step:-step, step:-step]
    assert torch.allclose(inner.double(), due[:, None, None].expand_as(inner), atol=1e-6)
    assert not came[:, :step].any()
    assert not came[:, :, -step:].any()


def test_a_sphere_has_its_radii_for_normals() -> None:
    """Of radius 1 around (0, 0, 3); central differences err by the square of the pixel."""
    d, centre = rays(), torch.tensor([0, 0, 3.0]).double()
    a, b = (d * d).sum(0), (d * centre[:, None, None]).sum(0)
    root = b**2 - a * (9 - 1)
    depth = torch.where(root > 0, (b - root.clamp(min=0).sqrt()) / a, 0)
    came = normals_of_depth(depth, FOCAL, CENTRE)
    due = d * depth - centre[:, None, None]
    well_inside = (due[:2].square().sum(0) < 0.5) & (depth > 0)
    known = (came != 0).any(0)
    assert known[well_inside].all()
    assert well_inside.sum() > 100
    assert angles(came[:, well_inside], due[:, well_inside]).max() < 1.5
    assert not known[depth == 0].any()


def test_a_pixel_beside_an_unknown_one_has_no_normal() -> None:
    depth = torch.ones(5, 7)
    depth[2, 3] = 0
    known = (normals_of_depth(depth, FOCAL, CENTRE) != 0).any(0)
    due = torch.zeros(5, 7, dtype=torch.bool)
    due[1:4, 1:6] = True
    for row, column in ((2, 3), (1, 3), (3, 3), (2, 2), (2, 4)):
        due[row, column] = False
    assert torch.equal(known, due)


def test_an_image_smaller_than_the_step_has_no_normals() -> None:
    assert not normals_of_depth(torch.ones(5, 7), FOCAL, CENTRE, step=3).any()


def test_angles_are_exact_near_zero_and_near_half_a_turn() -> None:
    tilts = torch.tensor([0, 1e-7, 0.5, math.pi / 2, math.pi], dtype=torch.float64)
    tilted = torch.stack([tilts.sin(), torch.zeros_like(tilts), tilts.cos()])
    ahead = torch.tensor([0, 0, 2.0]).double()[:, None].expand_as(tilted)
    assert torch.allclose(angles(tilted, ahead), tilts * 180 / math.pi, rtol=1e-9, atol=0)
    assert angles(torch.zeros(3, 1), ahead[:, :1]) == 90


def test_figures_are_those_of_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    counted: list[list[float]] = []
    rows = []
    for share in (0.9, 0.3, 0.0):
        truth = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=generator), dim=0)
        noise = torch.randn(3, 4, 5, generator=generator) * 0.4
        prediction = torch.nn.functional.normalize(truth + noise, dim=0)
        truth = truth * (torch.rand(4, 5, generator=generator) < share)
        rows.append(normal_sums(prediction, truth))
        errors = []
        for row in range(4):
            for column in range(5):
                a, b = prediction[:, row, column].tolist(), truth[:, row, column].tolist()
                if any(b):
                    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
                    errors.append(math.degrees(math.acos(min(1.0, dot))))
        counted += [errors] if errors else []
    came = normal_scores(torch.stack(rows))
    flat = [e for errors in counted for e in errors]
    due = {
        "mean_angle_per_image": np.mean([np.mean(e) for e in counted]),
        "rmse_angle_per_image": np.mean([np.sqrt(np.mean(np.square(e))) for e in counted]),
        "mean_angle_pooled": np.mean(flat),
        "rmse_angle_pooled": np.sqrt(np.mean(np.square(flat))),
    }
    for limit in (11.25, 22.5, 30):
        within = [np.mean(np.array(e) < limit) * 100 for e in counted]
        due[f"within_{limit:g}_per_image"] = np.mean(within)
        due[f"within_{limit:g}_pooled"] = np.mean(np.array(flat) < limit) * 100
    assert len(counted) == 2
    assert came == pytest.approx(due, rel=1e-5)
    with pytest.raises(RuntimeError, match="no image has a pixel of known normal"):
        normal_scores(torch.zeros(2, 6))


def test_the_loss_is_the_negative_log_likelihood_of_the_angle() -> None:
    raw = torch.tensor([[0.3, 0.0, -2.0, 0.7], [0.0, 1.0, -1.0, -3.0]])[:, :, None]
    truth = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0]])[:, :, None]
    due = 0.0
    for x, y, z, k in raw[:, :, 0].tolist():
        kappa = (k if k > 0 else math.exp(k) - 1) + 1.01
        angle = math.acos(-z / math.sqrt(x * x + y * y + z * z))
        due -= math.log(kappa**2 + 1) - kappa * angle - math.log(1 + math.exp(-kappa * math.pi))
    came = angular_loss(raw, truth, torch.ones(2, 1, dtype=torch.bool))
    assert float(came) == pytest.approx(due / 2, rel=1e-5)


def test_the_loss_leaves_out_what_is_unknown_and_is_smooth_at_the_truth() -> None:
    raw = torch.tensor([0.0, 0.0, -1.0, 0.0]).view(1, 4, 1).repeat(1, 1, 2).requires_grad_()
    truth = torch.tensor([0.0, 0.0, -1.0]).view(1, 3, 1).repeat(1, 1, 2)
    known = torch.tensor([[True, False]])
    angular_loss(raw, truth, known).backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert not raw.grad[..., 1].any()
    assert angular_loss(raw, truth, known & False) == 0


def benchmark(**changes: Any) -> Normals:
    entry = {
        "kind": "normals",
        "dataset": {"kind": "folder", "root": "nowhere"},
        "probe": {"steps": 1, "batch_size": 1, "lr": 0.1},
        "head": {"kind": "linear"},
    }
    built = build_benchmark(parse_benchmark(entry | changes))
    assert isinstance(built, Normals)
    return built


def test_a_mirrored_scene_has_mirrored_normals() -> None:
    """Those of the mirrored depth are the mirrored ones: the first component changes its sign."""
    generator = torch.Generator().manual_seed(0)
    depth = 2 + torch.rand(9, 12, generator=generator)
    here = normals_of_depth(depth, FOCAL, (4.5, 6.0))
    there = normals_of_depth(depth.flip(-1), FOCAL, (4.5, 6.0))
    task = benchmark().tasks()[0]
    mirrored = task.adapt(here.flip(-1), 1.0, True)
    assert torch.allclose(mirrored, there, atol=1e-6)
    assert torch.equal(task.adapt(here.flip(-1)[None], 1.0, True)[0], mirrored)


def test_normals_come_from_the_file_or_from_depth_or_it_is_a_message() -> None:
    sample = DepthSample(Path("a.jpg"), Path("a.png"), "a")
    depth, image = np.ones((5, 7), np.float32), np.zeros((5, 7, 3), np.uint8)
    given = np.tile(np.array([1, 0, 0], np.float32), (5, 7, 1))
    from_file = DepthView(image, depth, given, None, (2.5, 3.5))
    assert torch.equal(benchmark().truth(from_file, sample)[:, 0, 0], torch.tensor([1.0, 0, 0]))
    computed = DepthView(image, depth, None, FOCAL, (2.5, 3.5))
    assert torch.allclose(benchmark().truth(computed, sample)[:, 2, 3], torch.tensor([0.0, 0, -1]))
    with pytest.raises(DataError, match="'a' has no normals.*dataset.normals or dataset.focal_px"):
        benchmark().truth(DepthView(image, depth, None, None, (2.5, 3.5)), sample)


def write(root: Path) -> Path:
    """Images of nine walls, whose colours are their normals; the top rows are unknown."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("rgb", "depth", "normals"):
            (root / split / kind).mkdir(parents=True)
        for number in range(6):
            walls = generator.uniform(-1, 1, (3, 3, 3)) - (0, 0, 2)
            normals = (walls / np.linalg.norm(walls, axis=2, keepdims=True)).repeat(8, 0)
            normals = normals.repeat(8, 1)
            rgb = ((normals + 1) * 127.5).round().astype(np.uint8)
            Image.fromarray(rgb).save(root / split / "rgb" / f"{number}.png")
            normals[:2] = 0
            np.save(root / split / "normals" / f"{number}.npy", normals)
            np.save(root / split / "depth" / f"{number}.npy", np.ones((24, 24)))
    return root


@pytest.mark.long
def test_a_probe_beats_the_mean_map_where_colours_are_normals(tmp_path: Path) -> None:
    chosen = benchmark(
        dataset={
            "kind": "folder",
            "root": str(write(tmp_path)),
            "normals": ("train/normals", "test/normals"),
        },
        probe={"steps": 150, "batch_size": 3, "lr": 0.03},
        input={"flip": False},  # a colour that says "to the right" does not when mirrored
    )
    encoder = Pixels(PixelsConfig(patch_size=4, resolution=(24, 24)))
    figures = chosen.measure(encoder, 0, tmp_path).metrics
    assert next(iter(figures)) == "mean_angle_per_image"
    assert figures["mean_angle_per_image"] < 0.6 * figures["mean_map_mean_angle_per_image"]
    floor = json.loads((tmp_path / "figures.json").read_text())["mean map"]
    assert figures["within_30_pooled"] > floor["within_30_pooled"]
    assert (tmp_path / "predictions.png").is_file()
