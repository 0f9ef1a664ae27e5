"""The standardised space around an upsampler, and the pattern that a position bias takes away."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.phi_s import FeatureStatistics, PhiS, fit_phi_s
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.consistency import Consistency, ConsistencyConfig
from teachers.upsamplers.downsampler import BoxDownsampler
from teachers.upsamplers.resize import resize
from teachers.upsamplers.standardised import PositionBias, Standardised
from teachers.upsamplers.tile import Tile
from teachers.upsamplers.upsampler import Upsampler
from teachers.upsamplers.views import ViewsConfig, sample_homographies, warp_images

DIM = 8
SPEC = FeatureSpec(summary_dim=3, spatial_dim=DIM, patch_size=4, resolution=(12, 20))
GRID = (3, 5)
SLIGHT = ViewsConfig()
IMAGES = torch.rand(2, 3, 24, 60, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """A linear map of each patch, far from standardised, plus a pattern of the cell's place."""

    def __init__(self, pattern: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, DIM, 4, 4)
        nn.init.normal_(self.net.weight, std=0.5)
        self.pattern = pattern * torch.randn(DIM, *GRID)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        maps = 3 * self.net(images) + 7 * torch.arange(DIM)[:, None, None]
        if maps.shape[-2:] == GRID:
            maps = maps + self.pattern
        return Features(images.mean((2, 3)), maps)


def fit(encoder: Encoder) -> PhiS:
    statistics = FeatureStatistics.zeros(DIM)
    images = torch.rand(200, 3, *SPEC.resolution, generator=torch.Generator().manual_seed(1))
    statistics.update(encoder(images).spatial)
    return fit_phi_s(statistics)


def build(kind: str, phi_s: PhiS, *, bias: bool = True, **options: object) -> Standardised:
    torch.manual_seed(0)
    if kind == "featsharp":
        options["num_heads"] = 4
    config = parse_upsampler({"kind": kind, "factor": [2, 3], **options})
    assert config is not None
    return Standardised(build_upsampler(config, SPEC), phi_s, bias=bias)


def woken(upsampler: Standardised) -> Standardised:
    """Bias and fusion away from their start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in upsampler.named_parameters():
            if name.endswith(("_scale", "tile_position", "bias.map")):
                parameter.normal_()
    return upsampler


@pytest.mark.parametrize("kind", ["featsharp", "tile", "bilinear", "featup", "jafar"])
@torch.no_grad()
def test_with_a_bias_of_zero_it_is_the_plain_upsampler_on_standardised_maps(kind: str) -> None:
    encoder = Encoder()
    phi_s = fit(encoder)
    upsampler = build(kind, phi_s)
    came = upsampler.standardised(IMAGES, encoder)

    def encode(images: Tensor) -> Features:
        features = encoder(images)
        return Features(features.summary, phi_s(features.spatial))

    due = upsampler.inner(IMAGES, encode)
    assert torch.equal(came.low.spatial, due.low.spatial)
    assert torch.equal(came.high.spatial, due.high.spatial)
    without = build(kind, phi_s, bias=False).standardised(IMAGES, encoder)
    assert torch.equal(came.high.spatial, without.high.spatial)


@pytest.mark.parametrize("kind", ["featsharp", "tile"])
@torch.no_grad()
def test_forward_is_the_standardised_map_brought_back(kind: str) -> None:
    encoder = Encoder()
    upsampler = woken(build(kind, fit(encoder)))
    came, due = upsampler(IMAGES, encoder), upsampler.standardised(IMAGES, encoder)
    for own, standardised in zip(came, due, strict=True):
        torch.testing.assert_close(upsampler.phi_s(own.spatial), standardised.spatial)
        torch.testing.assert_close(own.summary, encoder(resize(IMAGES, (12, 20))).summary)


@torch.no_grad()
def test_an_affine_upsampler_without_bias_does_not_notice_the_other_space() -> None:
    """Tiles are copied, so standardising and back changes nothing: forward is in the own space."""
    encoder = Encoder()
    came = build("tile", fit(encoder), bias=False)(IMAGES, encoder)
    due = Tile(SPEC, (2, 3))(IMAGES, encoder)
    for own, plain in zip(came, due, strict=True):
        torch.testing.assert_close(own.spatial, plain.spatial, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_under_autocast_both_changes_of_space_stay_in_float32() -> None:
    """Maps far from zero would lose all of their detail in bfloat16."""
    encoder = Encoder()
    upsampler = woken(build("tile", fit(encoder)))

    def encode(images: Tensor) -> Features:  # as a Teacher does
        with torch.autocast("cpu", enabled=False):
            return encoder(images)

    due, standardised = upsampler(IMAGES, encode), upsampler.standardised(IMAGES, encode)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsampler(IMAGES, encode).high.spatial, due.high.spatial)
        came = upsampler.standardised(IMAGES, encode).high.spatial
    assert torch.equal(came, standardised.high.spatial)


@torch.no_grad()
def test_a_bias_of_zero_is_the_identity_and_another_grid_gets_it_interpolated() -> None:
    bias = PositionBias(DIM, GRID)
    maps = torch.randn(2, DIM, *GRID)
    assert torch.equal(bias(maps), maps)
    finer = torch.randn(2, DIM, 6, 15)
    assert torch.equal(bias(finer), finer)
    nn.init.normal_(bias.map)
    assert torch.equal(bias(maps), maps + bias.map)
    due = F.interpolate(bias.map[None], (6, 15), mode="bilinear")
    torch.testing.assert_close(bias(finer), finer + due)
    bias.map.copy_(torch.arange(DIM)[:, None, None].expand(DIM, *GRID))
    torch.testing.assert_close(bias(finer), finer + torch.arange(DIM)[:, None, None])


@torch.no_grad()
def test_the_bias_is_added_to_whole_images_and_to_every_tile_alike() -> None:
    encoder = Encoder()
    upsampler = build("tile", fit(encoder))
    before = upsampler.standardised(IMAGES, encoder)
    assert upsampler.bias is not None
    nn.init.normal_(upsampler.bias.map)
    after = upsampler.standardised(IMAGES, encoder)
    due = upsampler.bias.map
    torch.testing.assert_close(after.low.spatial - before.low.spatial, due.expand(2, -1, -1, -1))
    periodic = due.repeat(1, 2, 3).expand(2, -1, -1, -1)
    torch.testing.assert_close(after.high.spatial - before.high.spatial, periodic)


@torch.no_grad()
def test_a_shift_of_the_bias_by_one_vector_changes_no_loss() -> None:
    encoder = Encoder()
    upsampler = build("tile", fit(encoder))
    loss = Consistency(ConsistencyConfig(uncertainty=False), DIM, BoxDownsampler((2, 3)))
    due = _loss(upsampler, loss, encoder)[0]
    assert upsampler.bias is not None
    upsampler.bias.map += torch.randn(DIM, 1, 1)
    torch.testing.assert_close(_loss(upsampler, loss, encoder)[0], due, rtol=1e-4, atol=1e-5)
    upsampler.bias.map[:, 1] += 1
    assert _loss(upsampler, loss, encoder)[0] > due + 0.1


def test_training_the_bias_alone_finds_minus_the_pattern_up_to_one_vector() -> None:
    """An encoder that is the same at every place, but for a pattern added to each map it makes."""
    encoder = Encoder(pattern=4.0)
    phi_s = fit(encoder)
    upsampler = build("bilinear", phi_s)
    loss = Consistency(ConsistencyConfig(uncertainty=False), DIM, BoxDownsampler((2, 3)))
    assert upsampler.bias is not None
    optimizer = torch.optim.Adam([upsampler.bias.map], lr=0.1)
    # Views far apart: only where a cell is seen at several places is the pattern not the image.
    views = ViewsConfig(num_views=4, zoom=2.0, perspective=(0.05, 0.1), rotation_degrees=30)
    fidelities = []
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        total, mse = _loss(upsampler, loss, encoder, views, step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        fidelities.append(1 / float(mse))
    pattern = phi_s.alpha * torch.einsum("ij,jhw->ihw", phi_s.rotation, encoder.pattern)
    found = upsampler.bias.map.detach() + pattern
    left = found - found.mean((1, 2), keepdim=True)
    whole = pattern - pattern.mean((1, 2), keepdim=True)
    assert left.norm() < 0.1 * whole.norm()
    assert fidelities[-1] > 3 * fidelities[0]


def _loss(
    upsampler: Standardised,
    loss: Consistency,
    encoder: Encoder,
    config: ViewsConfig = SLIGHT,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(4, 3, 4, 8, generator=generator)
    images = F.interpolate(coarse, (24, 60), mode="bilinear")
    homographies = sample_homographies(config, 4, (6, 15), generator)
    low, high = upsampler.standardised(images, encoder)
    views = upsampler.standardise(encoder(warp_images(images, homographies, (12, 20))).spatial)
    terms = loss(
        high.spatial,
        views.unflatten(0, (4, -1)),
        homographies,
        low=low.spatial,
        images=images,
        generator=generator,
    )
    return terms.total, terms.mse


def test_an_upsampler_that_changes_the_channels_is_refused() -> None:
    with pytest.raises(TeacherError, match="from 8 to 16 channels cannot run in standardised"):
        build("s2", fit(Encoder()), beta=None)
    assert build("s2", fit(Encoder())).spatial_dim == DIM


@pytest.mark.parametrize("kind, passes", [("featsharp", 7), ("bilinear", 1)])
def test_it_costs_and_promises_what_the_upsampler_inside_does(kind: str, passes: int) -> None:
    upsampler: Upsampler = build(kind, fit(Encoder()))
    assert (upsampler.num_forwards, upsampler.factor, upsampler.spec) == (passes, (2, 3), SPEC)
