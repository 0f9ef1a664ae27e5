"""Where the cells of CNNs are: against the pixels that a cell depends on, and a ramp that returns.

The networks here only average, so that a map of a ramp says where its cells are.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.benchmarks.dense.dense_map import dense_map, padded_size, to_pixels
from distill.benchmarks.map_points import cell_centres, sample_map
from distill.targets.routes import choose_route
from teachers.build import build_teacher, parse_teacher
from teachers.even_cells import even_encoder, lay_evenly
from teachers.features import Features, FeatureSpec, Frame, Padding
from teachers.teacher import Teacher
from teachers.timm_grid import padding_of
from teachers.timm_source import timm  # imported after torchvision's operators are repaired
from teachers.upsampled import UpsampledTeacher
from teachers.upsamplers.bilinear import Bilinear
from teachers.upsamplers.featsharp import FeatSharp, FeatSharpConfig
from teachers.upsamplers.tile import Tile

PADDINGS: tuple[Padding, ...] = ("same", "symmetric")
Size = tuple[int, int]


def strided(padding: Padding, levels: int) -> nn.Sequential:
    """Halvings by filters of 3 x 3 that average."""
    filters = []
    for _ in range(levels):
        options: dict[str, Any] = {"kernel_size": 3, "stride": 2, "groups": 3, "bias": False}
        if padding == "same":
            filters.append(timm.layers.Conv2dSame(3, 3, **options))
        else:
            filters.append(nn.Conv2d(3, 3, padding=1, **options))
        nn.init.constant_(filters[-1].weight, 1 / 9)
    return nn.Sequential(*filters)


class Averages(Teacher):
    """A CNN of stride 8 that averages the colours of 15 x 15 pixels."""

    def __init__(self, padding: Padding, resolution: Size) -> None:
        spec = FeatureSpec(
            summary_dim=None,
            spatial_dim=3,
            patch_size=8,
            resolution=resolution,
            any_resolution=True,
            padding=padding,
        )
        super().__init__(spec, mean=(0, 0, 0), std=(1, 1, 1))
        self.network = strided(padding, 3)

    def extract(self, images: Tensor) -> Features:
        return Features(None, self.network(images))


def ramp(height: int, width: int) -> Tensor:
    """(1, 3, H, W): y, x and 1, in units of 100 px, at the pixels' centres."""
    y, x = ((torch.arange(side) + 0.5) / 100 for side in (height, width))
    return torch.stack([*torch.meshgrid(y, x, indexing="ij"), torch.ones(height, width)])[None]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("side", [256, 257, 260, 275, 288])
def test_a_frame_is_where_the_pixels_are_that_a_cell_depends_on(
    padding: Padding, side: int
) -> None:
    """By the gradient, in a network of stride 32 that reaches 31 px to each side."""
    spec = FeatureSpec(
        summary_dim=None,
        spatial_dim=3,
        patch_size=32,
        resolution=(side, side),
        any_resolution=True,
        padding=padding,
    )
    image = torch.zeros(1, 3, 64, side, requires_grad=True)  # the rows do not matter
    maps = strided(padding, 5)(image)
    assert maps.shape[2:] == spec.grid(64, side)
    frame = spec.frame(64, side)
    pitch = frame.width / maps.shape[3]
    for cell in (3, 4):
        (gradient,) = torch.autograd.grad(maps[0, 0, 1, cell], image, retain_graph=True)
        weights = gradient[0, 0].sum(0).double()
        place = (weights * (torch.arange(side) + 0.5)).sum() / weights.sum()
        assert frame.left + (cell + 0.5) * pitch == pytest.approx(place.item(), abs=1e-4)


def test_nine_cells_of_260_pixels_tile_the_image_and_eight_of_256_lie_half_a_cell_off() -> None:
    """As measured best, see `FeatureSpec.frame`; so the native map is used as it is."""
    entry = {"kind": "timm", "model": "efficientnet_lite2_260"}
    spec = build_teacher(parse_teacher(entry), device="meta").spec
    assert (spec.grid(260, 260), spec.padding) == ((9, 9), "same")
    assert spec.frame(260, 260) == Frame(260, 260)
    assert spec.frame(256, 256) == Frame(256, 256, 15.5, 15.5)
    maps = torch.rand(1, 2, 9, 9)
    assert lay_evenly(maps, spec, (260, 260)) is maps


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(96, 104), (101, 99)])
def test_a_dense_probe_and_keypoints_find_a_ramp_where_it_is(padding: Padding, size: Size) -> None:
    encoder = Averages(padding, size)
    images = ramp(*size)
    maps, covers = dense_map(encoder, images)
    assert maps.shape[2:] == (13, 13) if size[0] > 100 else (12, 13)
    inner = (..., slice(24, 72), slice(24, 72))  # away from what the network pads
    again = to_pixels(maps, covers, size)
    assert torch.allclose(again[inner], images[inner], atol=1e-4)
    every = to_pixels(maps, covers, size, 4)
    assert torch.allclose(every, again[..., 2::4, 2::4], atol=1e-5)
    points = torch.tensor([[40.0, 50.0], [33.5, 61.25]], dtype=torch.float64)
    sampled = sample_map(maps[0], covers, points, "bilinear")
    assert torch.allclose(100 * sampled[:, [1, 0]].double(), points, atol=1e-2)
    half = to_pixels(maps, covers, size, resized=(48, 52))
    due = torch.nn.functional.interpolate(again, (48, 52), mode="bilinear")
    assert torch.allclose(half, due, atol=1e-5)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(96, 104), (101, 99)])
def test_resized_and_upsampled_maps_have_cells_that_tile_the_image(
    padding: Padding, size: Size
) -> None:
    encoder = Averages(padding, size)
    images = ramp(*size)

    def check(maps: Tensor, slack: float = 1e-4) -> None:
        h, w = maps.shape[2:]
        centres = cell_centres((h, w), Frame(*size)).view(h, w, 2)
        due = torch.stack([centres[..., 1], centres[..., 0]]).float() / 100
        inner = (..., slice(h // 4, -(h // 4)), slice(w // 4, -(w // 4)))
        assert torch.allclose(maps[0, :2][inner], due[inner], atol=slack)

    check(even_encoder(encoder)(images).spatial)
    route = choose_route(encoder, (64, 64), 8, "interpolate")
    check(route.encode(encoder, images).spatial)
    spec = encoder.spec
    twice = UpsampledTeacher(encoder, Bilinear(spec, (2, 2)))
    assert twice.spec.padding is None
    check(twice.upsample(images).high.spatial)
    config = FeatSharpConfig(factor=(2, 2), num_heads=1, layer_scale=0)  # the interpolated map
    check(UpsampledTeacher(encoder, FeatSharp(spec, config)).upsample(images).high.spatial)
    tiles = UpsampledTeacher(encoder, Tile(spec, (2, 2))).upsample(images).high.spatial
    h, w = tiles.shape[2] // 2, tiles.shape[3] // 2
    inside = (..., slice(h // 4, -(h // 4)), slice(w // 4, -(w // 4)))  # away from a tile's rim
    first, second = tiles[0, :2, :h, :w][inside], tiles[0, :2, h:, w:][inside]
    due = torch.tensor(size).view(2, 1, 1) / 200
    assert torch.allclose(second - first, due.expand_as(first), atol=2e-3)
    assert torch.allclose(first[1].diff(dim=1), due[1] / w, atol=2e-3)


def test_a_route_at_the_matched_size_is_the_networks_own_map() -> None:
    """To move its cells blurs more than it gains, see `distill.targets.routes`."""
    encoder, images = Averages("same", (101, 99)), torch.rand(1, 3, 64, 64)
    route = choose_route(encoder, (64, 64), 8)
    assert (route.kind, route.grid) == ("matched", (8, 8))
    assert torch.equal(route.encode(encoder, images).spatial, encoder(images).spatial)


def test_images_are_padded_to_whole_cells_unless_they_are_native() -> None:
    spec = Averages("same", (101, 99)).spec
    assert padded_size(spec, 101, 99) == (101, 99)
    assert padded_size(spec, 101, 98) == (104, 104)
    assert spec.accepts(101, 98)
    assert not spec.accepts(0, 98)
    assert spec.nearest(3, 5) == (3, 5)
    assert spec.grid(3, 9) == (1, 2)


@pytest.mark.parametrize(
    "model, padding",
    [
        ("resnet10t", None),  # its shortcuts average 2 x 2 pixels
        ("resnet18", "symmetric"),
        ("tf_mobilenetv3_small_minimal_100", "same"),
        ("convnext_atto", None),  # patches
    ],
)
def test_the_padding_of_timms_networks(model: str, padding: Padding | None) -> None:
    with torch.device("meta"):
        assert padding_of(timm.create_model(model)) == padding


def test_a_cnn_takes_a_resolution_that_is_no_multiple_of_its_stride() -> None:
    entry = {"kind": "timm", "model": "tf_mobilenetv3_small_minimal_100", "weights": "none"}
    teacher = build_teacher(parse_teacher(entry | {"resolution": [65, 98]}))
    images = torch.rand(1, 3, 65, 98)
    assert teacher(images).spatial.shape[2:] == (3, 4)
    assert teacher(torch.rand(1, 3, 33, 31)).spatial.shape[2:] == (2, 1)
