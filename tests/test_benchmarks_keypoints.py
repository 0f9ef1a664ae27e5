"""PCK of nearest neighbours: half-pixel centres throughout, and figures over exact matches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.correspondence.keypoints import place
from distill.benchmarks.map_points import cell_centres, encoder_size, sample_map
from distill.benchmarks.sharing import own_share
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.errors import TeacherError
from teachers.features import Frame
from tests.doubles import SPEC
from tests.ranks import run_on_ranks

CELL = 4  # pixels
PLACES = [(1, 2), (4, 0), (6, 3), (0, 3)]  # cells (column, row) of the keypoints


def mosaic(columns: int, rows: int, enlarge: int = 1) -> np.ndarray:
    """An image whose cells have colours of their own, the same ones in any size."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 200, (rows, columns, 3), dtype=np.uint8)
    side = CELL * enlarge
    return colours.repeat(side, 0).repeat(side, 1)


def write_set(folder: Path, enlarge: int = 1, shift_px: float = 0.0) -> None:
    """Two images of 8 x 4 cells, the second larger; keypoints at the centres of cells."""
    folder.mkdir(parents=True)
    points = {}
    for name, scale in {"a": 1, "b": enlarge}.items():
        Image.fromarray(mosaic(8, 4, scale)).save(folder / f"{name}.png")
        points[name] = [[(c + 0.5) * CELL * scale for c in cell] for cell in PLACES]
    points["b"] = [[x + shift_px, y + shift_px] for x, y in points["b"]]
    (folder / "keypoints.json").write_text(json.dumps(points))


def figures(root: Path, alpha: float, size: int = 32, **options: object) -> dict[str, float]:
    entry = {"kind": "keypoints", "dataset": {"kind": "keypoints", "root": str(root)}}
    benchmark = build_benchmark(
        parse_benchmark({**entry, "alpha": alpha, "size": size, "batch_size": 1, **options})
    )
    encoder = Pixels(PixelsConfig(patch_size=CELL, resolution=(32, 32)))
    return benchmark.measure(encoder, 0, root).metrics


@pytest.mark.parametrize("enlarge", [1, 2])
def test_matches_are_exact_to_a_hundredth_of_a_cell(tmp_path: Path, enlarge: int) -> None:
    """The box is 24 px wide: a shift by half a cell would be an error of 0.08, nine times alpha."""
    write_set(tmp_path / "x", enlarge)
    measured = figures(tmp_path, alpha=0.0002)
    assert measured == {"pck@0.0002": 100, "pck@0.0002_class_mean": 100} | {
        "pck@0.0002_same_position": 100
    }


def test_other_sizes_of_the_input_find_the_same_points(tmp_path: Path) -> None:
    """Of 60 px an image of 2 to 1 covers 60 x 30, fifteen rows below the top: no whole cells."""
    write_set(tmp_path / "x")
    assert figures(tmp_path, alpha=0.09, size=64)["pck@0.09"] == 100


def test_figures_are_over_points_and_over_categories(tmp_path: Path) -> None:
    """Six keypoints of a category that is found, and two of one that is not."""
    write_set(tmp_path / "found")
    write_set(tmp_path / "lost", shift_px=9)
    path = tmp_path / "lost" / "keypoints.json"
    points = json.loads(path.read_text())
    path.write_text(json.dumps({name: found[:2] for name, found in points.items()}))
    measured = figures(tmp_path, alpha=0.01)
    assert measured["pck@0.01"] == pytest.approx(100 * 8 / 12)
    assert measured["pck@0.01_class_mean"] == pytest.approx(50)


def test_viewpoints_have_figures_where_they_are_stated(tmp_path: Path) -> None:
    from tests.test_data_keypoints import write_spair

    write_spair(tmp_path)
    measured = figures(tmp_path, 0.1, dataset={"kind": "spair", "root": str(tmp_path)})
    assert "pck@0.1_viewpoint_2" in measured
    assert "pck@0.1_viewpoint_0" not in measured


def test_the_floor_is_the_same_share_of_width_and_height(tmp_path: Path) -> None:
    write_set(tmp_path / "x", enlarge=2, shift_px=1.0)  # of 48 px: an error of 0.0295
    assert figures(tmp_path, alpha=0.029)["pck@0.029_same_position"] == 0
    # From b to a the points are 1/2 px off, of 24 px: the same share.
    assert figures(tmp_path, alpha=0.03)["pck@0.03_same_position"] == 100


def measured_on_ranks(root: str) -> dict[str, float]:
    assert len(own_share(2)) <= 2
    return figures(Path(root), alpha=0.09)


@pytest.mark.process
def test_two_ranks_give_the_figures_of_one(tmp_path: Path) -> None:
    write_set(tmp_path / "x")
    write_set(tmp_path / "y", shift_px=3)
    due = measured_on_ranks(str(tmp_path))
    assert 0 < due["pck@0.09"] < 100
    assert run_on_ranks(2, measured_on_ranks, str(tmp_path)) == [due, due]


def test_a_set_without_a_common_keypoint_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "x")
    (tmp_path / "x" / "keypoints.json").write_text('{"a": [null, [1, 1]], "b": [[1, 1], null]}')
    with pytest.raises(DataError, match="no keypoint is visible in two images"):
        figures(tmp_path, alpha=0.1)


def test_a_placed_image_is_centred_on_white_and_points_follow() -> None:
    placed = place(torch.zeros(3, 10, 40), (24, 20))
    assert placed.pixels.shape == (3, 24, 20)
    dark = (placed.pixels[0] == 0).nonzero()
    assert (dark.min(0).values.tolist(), dark.max(0).values.tolist()) == ([9, 0], [13, 19])
    assert (placed.pixels[:, :9] == 1).all()
    corner = torch.tensor([40.0, 10.0], dtype=torch.float64)
    assert (placed.scale * corner + placed.offset).tolist() == [20, 14]


def ramp(covers: Frame, grid: tuple[int, int]) -> Tensor:
    """A map (2, h, w) whose cells say where their centres are."""
    return cell_centres(grid, covers).T.reshape(2, *grid)


@pytest.mark.parametrize("covers", [Frame(24, 40), Frame(24, 40, -3.5, 2)])
def test_a_map_of_places_says_where_it_is_sampled(covers: Frame) -> None:
    points = torch.tensor([[17.3, 9.2], [20.0, 12.5], [11.1, 14.0]], dtype=torch.float64)
    sampled = sample_map(ramp(covers, (6, 10)), covers, points, "bilinear")
    assert torch.allclose(sampled, points)


def test_sampling_a_grid_of_points_is_resizing() -> None:
    maps = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    resized = torch.nn.functional.interpolate(maps[None], (15, 28), mode="bicubic")
    covers = Frame(20, 14)
    sampled = sample_map(maps, covers, cell_centres((15, 28), covers), "bicubic")
    assert torch.allclose(sampled.T.reshape(3, 15, 28), resized[0], atol=1e-6)


def test_an_encoder_of_one_size_says_how_to_use_it() -> None:
    assert encoder_size(SPEC, "native") == encoder_size(SPEC, (12, 20)) == (12, 20)
    with pytest.raises(TeacherError, match="takes 12 x 20 px only; size=native gives"):
        encoder_size(SPEC, (800, 800))
