"""Joint bilateral upsampling, against the published form with unfolded neighbourhoods."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from teachers.features import Features, FeatureSpec
from teachers.upsamplers.build import build_upsampler, parse_upsampler
from teachers.upsamplers.featup import FeatUp
from teachers.upsamplers.folded_filter import upsample_and_filter
from teachers.upsamplers.guidance import area_resize, guidance
from teachers.upsamplers.jbu import JBU, JBULevel, level_factors
from teachers.upsamplers.neighbour_products import neighbour_products

CASES = [
    ((1, 1), (4, 3)),
    ((2, 2), (4, 5)),
    ((3, 3), (5, 2)),
    ((4, 4), (2, 3)),
    ((5, 5), (2, 4)),
    ((2, 3), (4, 3)),
    ((7, 7), (2, 1)),
    ((12, 12), (2, 1)),
    ((4, 1), (1, 9)),  # one row of nine: the reflection goes to and fro
]


def neighbourhoods(maps: Tensor, radius: int) -> Tensor:
    """(B, D, H, W) to (B, D, taps, taps, H, W): every neighbourhood, copied."""
    for dim in (2, 3):
        places = np.pad(np.arange(maps.shape[dim]), radius, mode="reflect")
        maps = maps.index_select(dim, torch.from_numpy(places))
    taps = 2 * radius + 1
    unfolded = F.unfold(maps, taps)
    size = (maps.shape[2] - taps + 1, maps.shape[3] - taps + 1)
    return unfolded.view(*maps.shape[:2], taps, taps, *size)


def published_kernels(level: JBULevel, guide: Tensor) -> Tensor:
    """Range times space, then normalised; (B, taps, taps, H, W)."""
    r = level.radius
    keys = level.project(guide.movedim(1, -1)).movedim(-1, 1)
    products = torch.einsum("bdijyx,bdyx->bijyx", neighbourhoods(keys, r), keys)
    temperature = level.log_temperature.exp().clamp(1e-4, 1e4)
    ranges = (temperature * products).flatten(1, 2).softmax(1).view_as(products)
    u = torch.linspace(-1, 1, 2 * r + 1, dtype=guide.dtype)
    space = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * level.log_sigma.exp() ** 2))
    product = ranges * space[:, :, None, None]
    return product / product.sum((1, 2), keepdim=True)


def published_filter(source: Tensor, kernels: Tensor, radius: int) -> Tensor:
    """Interpolates, then filters with kernels (B, taps, taps, H, W)."""
    size = kernels.shape[-2:]
    up = F.interpolate(source, size, mode="bilinear", align_corners=False)
    return (neighbourhoods(up, radius) * kernels[:, None]).sum((2, 3))


def published(jbu: JBU, source: Tensor, guide: Tensor) -> Tensor:
    """The whole stack."""
    for (fh, fw), level in zip(jbu.steps, jbu.levels, strict=True):
        pooled = F.adaptive_avg_pool2d(guide, (fh * source.shape[2], fw * source.shape[3]))
        source = published_filter(source, published_kernels(level, pooled), level.radius)
    return source


def scatter_parameters(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def float64_case(factor: tuple[int, int], size: tuple[int, int]) -> tuple[JBU, Tensor, Tensor]:
    """A stack with random parameters, and two maps and images for it."""
    torch.manual_seed(0)
    jbu = JBU(factor, key_dim=8).double()
    scatter_parameters(jbu)
    source = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    guide = torch.randn(2, 3, 41, 50, dtype=torch.float64, requires_grad=True)
    return jbu, source, guide


@pytest.mark.parametrize("factor, size", CASES)
def test_it_equals_the_published_form_with_all_its_gradients(
    factor: tuple[int, int], size: tuple[int, int]
) -> None:
    jbu, source, guide = float64_case(factor, size)
    ours, theirs = jbu(source, guide), published(jbu, source, guide)
    assert ours.shape == (2, 3, factor[0] * size[0], factor[1] * size[1])
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    back, inputs = torch.randn_like(ours), [source, *([guide] if jbu.steps else [])]
    inputs += list(jbu.parameters())
    gradients = [torch.autograd.grad(out, inputs, back) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_one_softmax_is_the_normalised_product_of_range_and_space() -> None:
    jbu, _, guide = float64_case((2, 2), (4, 5))
    level = jbu.levels[0]
    kernels = level.kernels(guide)
    torch.testing.assert_close(kernels.movedim((3, 4), (1, 2)), published_kernels(level, guide))


@pytest.mark.parametrize("size", [(9, 12), (1, 5), (2, 3), (13, 7)])
@pytest.mark.parametrize("radius", [1, 3])
def test_products_with_neighbours_are_those_of_unfolded_keys(
    size: tuple[int, int], radius: int
) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, *size, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours = neighbour_products(*leaves, radius)
    queries, keys = (leaf.movedim(-1, 1) for leaf in leaves)
    slow = torch.einsum("bdijyx,bdyx->byxij", neighbourhoods(keys, radius), queries)
    torch.testing.assert_close(ours, slow)
    back = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, leaves, back) for out in (ours, slow)]
    torch.testing.assert_close(*gradients)


def test_products_in_several_pieces_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 20, 9, 4, requires_grad=True) for _ in range(2)]
    results = []
    for tiles in (1, 17, 10**6):  # rows of tiles, pairs of images, all
        monkeypatch.setattr("teachers.upsamplers.neighbour_products._CPU_TILES", tiles)
        out = neighbour_products(*leaves, 3)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("target", [(9, 14), (5, 3), (2, 40)])
def test_the_folded_filter_takes_any_size(target: tuple[int, int]) -> None:
    torch.manual_seed(0)
    source = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    kernels = torch.randn(2, *target, 7, 7, dtype=torch.float64)
    slow = published_filter(source, kernels.movedim((3, 4), (1, 2)), 3)
    torch.testing.assert_close(upsample_and_filter(source, kernels), slow)


def test_a_kernel_is_positive_and_sums_to_one() -> None:
    torch.manual_seed(0)
    kernels = JBULevel().kernels(3 * torch.randn(2, 3, 10, 12))
    assert (kernels >= 0).all()
    torch.testing.assert_close(kernels.sum((3, 4)), torch.ones(2, 10, 12), atol=1e-6, rtol=0)


def test_a_constant_map_stays_and_the_result_keeps_the_range_of_the_source() -> None:
    torch.manual_seed(0)
    jbu, guide = JBU((4, 2)), torch.randn(2, 3, 64, 48)
    constant = torch.tensor([3.0, -5.0]).view(1, 2, 1, 1).expand(2, 2, 4, 5)
    torch.testing.assert_close(jbu(constant, guide), constant[:, :, :1, :1].expand(2, 2, 16, 10))
    source = torch.randn(2, 3, 4, 5)
    out, low, high = jbu(source, guide), source.amin((2, 3)), source.amax((2, 3))
    assert (out.amin((2, 3)) >= low - 1e-5).all()
    assert (out.amax((2, 3)) <= high + 1e-5).all()


def gaussian_of_bilinear(source: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    u = torch.linspace(-1, 1, 7, dtype=source.dtype)
    kernel = torch.exp(-(u[:, None] ** 2 + u**2) / (2 * sigma**2))
    kernels = (kernel / kernel.sum()).view(1, 7, 7, 1, 1).expand(len(source), 7, 7, *size)
    return published_filter(source, kernels, 3)


@pytest.mark.parametrize("case", ["constant guidance", "zero projection", "low temperature"])
def test_without_colours_to_compare_it_is_a_gaussian_of_the_bilinear_map(case: str) -> None:
    jbu, source, guide = float64_case((2, 2), (4, 5))
    level = jbu.levels[0]
    with torch.no_grad():
        level.log_sigma.fill_(-0.4)
        level.log_temperature.fill_(-50.0 if case == "low temperature" else 0.0)
        if case == "zero projection":
            level.project[2].weight.zero_()
    if case == "constant guidance":
        guide = torch.full_like(guide, 0.7)
    expected = gaussian_of_bilinear(source, (8, 10), np.exp(-0.4))
    # The temperature is clamped at 1e-4, so the colours keep a trace of their say.
    tolerance = 1e-3 if case == "low temperature" else 1e-12
    torch.testing.assert_close(jbu(source, guide), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("beyond, bound", [(-50.0, 1e-4), (50.0, 1e4)])
def test_the_temperature_stays_between_its_bounds(beyond: float, bound: float) -> None:
    jbu, _, guide = float64_case((2, 2), (4, 5))
    level = jbu.levels[0]
    kernels = []
    for value in (beyond, np.log(bound), np.log(bound) - np.sign(beyond)):
        nn.init.constant_(level.log_temperature, value)
        kernels.append(level.kernels(guide))
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-9, atol=1e-12)
    assert not torch.equal(kernels[1], kernels[2])


def test_temperature_one_is_no_gaussian() -> None:
    jbu, source, guide = float64_case((2, 2), (4, 5))
    nn.init.zeros_(jbu.levels[0].log_temperature)
    nn.init.zeros_(jbu.levels[0].log_sigma)
    assert (jbu(source, guide) - gaussian_of_bilinear(source, (8, 10), 1.0)).abs().max() > 0.1


@pytest.mark.parametrize(
    "turn",
    [
        partial(torch.flip, dims=(2,)),
        partial(torch.flip, dims=(3,)),
        partial(torch.transpose, dim0=2, dim1=3),
    ],
)
def test_turning_image_and_map_turns_the_result(turn: partial[Tensor]) -> None:
    jbu, source, guide = float64_case((6, 6), (3, 4))
    torch.testing.assert_close(
        jbu(turn(source), turn(guide)), turn(jbu(source, guide)), atol=1e-12, rtol=0
    )


def test_numeric_derivatives_agree() -> None:
    torch.manual_seed(0)
    level = JBULevel(key_dim=2).double()
    scatter_parameters(level)
    source = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    guide = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in level.named_parameters()]
    assert {"log_temperature", "log_sigma"} <= set(names)

    def run(source: Tensor, guide: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        out: Tensor = torch.func.functional_call(level, parameters, (source, guide))
        return out

    assert torch.autograd.gradcheck(run, (source, guide, *level.parameters()))


def test_the_gradient_reaches_all_49_taps_of_every_kernel() -> None:
    # The published CUDA kernel reaches the taps 0, 1, 4, 9, 16, 25 and 36.
    torch.manual_seed(0)
    source = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    kernels = torch.rand(2, 10, 12, 7, 7, dtype=torch.float64, requires_grad=True)
    out = upsample_and_filter(source, kernels)
    back = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, kernels, back)
    up = F.interpolate(source, (10, 12), mode="bilinear", align_corners=False)
    expected = torch.einsum("bdyx,bdijyx->byxij", back, neighbourhoods(up, 3))
    torch.testing.assert_close(gradient, expected)
    assert (gradient != 0).all()


def test_levels_are_the_prime_factors_of_both_axes() -> None:
    assert level_factors((1, 1)) == []
    assert level_factors((12, 12)) == [(2, 2), (2, 2), (3, 3)]
    assert level_factors((7, 7)) == [(7, 7)]
    assert level_factors((4, 3)) == [(2, 3), (2, 1)]
    assert level_factors((1, 10)) == [(1, 2), (1, 5)]


def test_without_levels_the_map_is_returned_as_it_is() -> None:
    source = torch.randn(2, 3, 4, 5)
    assert JBU((1, 1))(source, torch.randn(2, 3, 8, 8)) is source


def test_a_level_has_the_published_parameters_less_two_that_cancel() -> None:
    # 1188 published: the amplitudes of range and space divide out in the normalisation.
    assert sum(p.numel() for p in JBULevel().parameters()) == 1188 - 2
    assert sum(p.numel() for p in JBU((12, 4)).parameters()) == 3 * 1186


class Largest(TorchDispatchMode):
    """Watches the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_of_all_neighbourhoods_exists_forwards_or_backwards() -> None:
    jbu, depth, side = JBU((2, 2)), 24, 48
    source = torch.randn(1, depth, side // 2, side // 2, requires_grad=True)
    guide = torch.randn(1, 3, side, side)
    with Largest() as ours:
        jbu(source, guide).sum().backward()
    with Largest() as theirs:
        published(jbu, source, guide).sum().backward()
    pixels = 4 * side**2
    assert theirs.bytes >= pixels * 49 * 32, "the watch sees what it should"
    assert ours.bytes <= pixels * 150, "the product of tiles is the largest, 144 a pixel"


def test_autocast_leaves_the_kernels_in_float32_and_the_map_in_its_dtype() -> None:
    torch.manual_seed(0)
    jbu, source, guide = JBU((2, 2)), torch.randn(1, 8, 5, 6), torch.randn(1, 3, 20, 24)
    expected = jbu(source, guide)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(jbu(source, guide), expected)
        half = jbu(source.bfloat16(), guide)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same() -> None:
    jbu, source, guide = float64_case((2, 3), (4, 5))
    expected = jbu(source, guide)
    torch.testing.assert_close(jbu.cuda()(source.cuda(), guide.cuda()).cpu(), expected)


def test_guidance_is_averaged_where_it_shrinks_and_interpolated_where_it_grows() -> None:
    images = torch.rand(2, 3, 12, 4)
    halved = images.view(2, 3, 6, 2, 4).mean(3)
    torch.testing.assert_close(area_resize(images, (6, 4)), halved)
    grown = F.interpolate(halved, (6, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(area_resize(images, (6, 9)), grown)


def test_guidance_is_whitened_like_imagenet() -> None:
    colour = torch.tensor([0.485, 0.456, 0.406 + 0.225]).view(1, 3, 1, 1)
    white = guidance(colour.expand(2, 3, 30, 20), (4, 5))
    expected = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    torch.testing.assert_close(white, expected, atol=1e-5, rtol=0)


def test_averaged_guidance_loses_the_noise_that_sampled_guidance_keeps() -> None:
    torch.manual_seed(0)
    noise, size = torch.randn(1, 3, 16 * 12, 16 * 12), (12, 12)
    averaged = area_resize(noise, size)
    sampled = F.interpolate(noise, size, mode="bilinear", align_corners=False)  # the public way
    assert averaged.std() == pytest.approx(1 / 16, rel=0.15)
    assert sampled.std() == pytest.approx(1 / 2, rel=0.15)
    edge = torch.ones_like(noise)
    edge[..., 96:] = -1
    level = JBULevel()
    clean = level.kernels(area_resize(edge, size))
    off_averaged = (level.kernels(area_resize(edge, size) + averaged) - clean).norm()
    off_sampled = (level.kernels(area_resize(edge, size) + sampled) - clean).norm()
    assert off_averaged < off_sampled / 4


def test_what_the_meta_device_walked_through_runs_on_the_cpu_afterwards() -> None:
    with torch.device("meta"):
        walked = JBU((3, 3))(torch.empty(1, 4, 11, 5), torch.empty(1, 3, 33, 15))
    assert walked.is_meta
    assert walked.shape == (1, 4, 33, 15)
    upsampled = JBU((3, 3))(torch.ones(1, 4, 11, 5), torch.rand(1, 3, 33, 15))
    torch.testing.assert_close(upsampled, torch.ones(1, 4, 33, 15))


SPEC = FeatureSpec(summary_dim=5, spatial_dim=4, patch_size=8, resolution=(32, 48))


def encode(images: Tensor) -> Features:
    assert images.shape[1:] == (3, 32, 48)
    pooled = F.avg_pool2d(images, 8)
    return Features(images.mean((2, 3)).repeat(1, 2)[:, :5], torch.cat([pooled, pooled[:, :1]], 1))


def test_featup_guides_the_native_map_with_the_image() -> None:
    torch.manual_seed(0)
    config = parse_upsampler({"kind": "featup", "factor": [2, 3]})
    assert config is not None
    upsampler = build_upsampler(config, SPEC)
    assert isinstance(upsampler, FeatUp)
    images = torch.rand(2, 3, 80, 100)
    low, high = upsampler(images, encode)
    assert upsampler.num_forwards == 1
    assert low.spatial.shape == (2, 4, 4, 6)
    assert high.summary is low.summary
    expected = published(upsampler.jbu, low.spatial, guidance(images, (8, 18)))
    torch.testing.assert_close(high.spatial, expected)


def test_featup_trains_every_parameter() -> None:
    torch.manual_seed(0)
    upsampler = FeatUp(SPEC, (2, 2), sigma=1.0)
    upsampler(torch.rand(2, 3, 64, 64), encode).high.spatial.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in upsampler.parameters())
