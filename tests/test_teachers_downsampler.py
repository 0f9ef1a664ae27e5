"""Downsamplers: centred windows, borders, and what the public one does instead."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.upsamplers.downsampler import AttentionDownsampler, BoxDownsampler, Downsampler
from teachers.upsamplers.views import ViewsConfig, sample_homographies, warp

FACTORS = list(range(1, 9))


class PublicDownsampler(nn.Module):
    """The public code's form, which ours departs from.

    Logits from a full k x k convolution of the blurred map, a Bernoulli mask in eval too, windows
    at every f-th cell, zero padding inside the softmax.
    """

    def __init__(self, dim: int, factor: int, kernel: int = 9) -> None:
        super().__init__()
        self.factor, self.kernel = factor, kernel
        shape = (kernel**2, dim, kernel, kernel)
        self.weight = nn.Parameter(1 + 0.01 * torch.randn(shape))
        self.bias = nn.Parameter(0.01 * torch.randn(kernel**2))
        self.tap_bias = nn.Parameter(0.1 * torch.randn(1, kernel**2, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        t = torch.linspace(-2, 2, 5).to(maps)
        blur = torch.exp(-(2**0.5) * t**2)
        blur = (blur / blur.sum()).repeat(maps.shape[1], 1, 1, 1)
        maps = F.conv2d(maps, blur.mT, padding=(2, 0), groups=maps.shape[1])
        maps = F.conv2d(maps, blur, padding=(0, 2), groups=maps.shape[1])
        options = {"stride": self.factor, "padding": self.kernel // 2}
        logits = F.conv2d(maps, self.weight, self.bias, **options)
        weights = (logits * (torch.rand_like(logits) < 0.8) + self.tap_bias).softmax(1)
        taps = F.unfold(maps, self.kernel, **options).unflatten(1, (maps.shape[1], -1))
        return (taps.unflatten(-1, weights.shape[2:]) * weights[:, None]).sum(2)


def uniform_public(factor: int) -> PublicDownsampler:
    """With all weights equal, so that only the place of its windows shows."""
    public = PublicDownsampler(2, factor)
    for parameter in public.parameters():
        nn.init.zeros_(parameter)
    return public


def uniform(
    dim: int, factor: tuple[int, int], kernel: tuple[int, int] | None = None
) -> Downsampler:
    downsampler = AttentionDownsampler(dim, factor, kernel)
    nn.init.zeros_(downsampler.tap_bias)
    return downsampler


def trained(dim: int, factor: tuple[int, int], seed: int = 0) -> AttentionDownsampler:
    """With random logits and biases, in float64."""
    torch.manual_seed(seed)
    downsampler = AttentionDownsampler(dim, factor).double()
    nn.init.normal_(downsampler.logit)
    nn.init.normal_(downsampler.tap_bias)
    return downsampler


def plain(downsampler: Downsampler, maps: Tensor) -> Tensor:
    """Downsampled without a warp."""
    still = torch.eye(3, dtype=torch.float64).expand(len(maps), 1, 3, 3)
    return downsampler(maps, still)[:, 0]


def cell_numbers(height: int, width: int) -> Tensor:
    """(1, 2, H, W): each cell's row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns])[None].float()


def direct(downsampler: AttentionDownsampler, maps: Tensor) -> Tensor:
    """The definition, cell by cell and tap by tap."""
    blur = torch.tensor([0.0023, 0.1631, 0.6692, 0.1631, 0.0023]).double()
    blur = blur / blur.sum()
    (fh, fw), (kh, kw) = downsampler.factor, downsampler.kernel
    batch, dim, height, width = maps.shape
    out = torch.zeros(batch, dim, height // fh, width // fw, dtype=maps.dtype)

    def logit(image: Tensor, y: int, x: int) -> Tensor:
        total = torch.zeros((), dtype=maps.dtype)
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                place = blur[dy + 2] * blur[dx + 2]
                total = total + place * (image[:, row, column] @ downsampler.logit)
        return total

    for b in range(batch):
        for j in range(height // fh):
            for i in range(width // fw):
                logits, values = [], []
                for ky in range(kh):
                    for kx in range(kw):
                        y, x = j * fh + ky - (kh - fh) // 2, i * fw + kx - (kw - fw) // 2
                        if 0 <= y < height and 0 <= x < width:
                            logits.append(logit(maps[b], y, x) + downsampler.tap_bias[ky, kx])
                            values.append(maps[b, :, y, x])
                weights = torch.stack(logits).softmax(0)
                out[b, :, j, i] = (torch.stack(values) * weights[:, None]).sum(0)
    return out


SHAPES = [((2, 3), (2, 3)), ((1, 2), (3, 2)), ((3, 1), (1, 4)), ((2, 2), (1, 1)), ((4, 5), (2, 1))]


@pytest.mark.parametrize("factor, grid", SHAPES)
def test_it_is_the_softmax_of_logits_and_biases_over_the_taps_inside_the_map(
    factor: tuple[int, int], grid: tuple[int, int]
) -> None:
    downsampler = trained(3, factor)
    maps = torch.randn(2, 3, grid[0] * factor[0], grid[1] * factor[1], dtype=torch.float64)
    torch.testing.assert_close(plain(downsampler, maps), direct(downsampler, maps))


def far_views(batch: int, num_views: int, size: tuple[int, int]) -> Tensor:
    """Some look well beyond the border of the base."""
    config = ViewsConfig(num_views=num_views, zoom=4, perspective=(0.1, 0.1), rotation_degrees=40)
    return sample_homographies(config, batch, size, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [(2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("build", [lambda f: BoxDownsampler(f), lambda f: trained(3, f)])
def test_views_are_downsampled_as_if_each_had_been_warped_first(
    build: Callable[[tuple[int, int]], Downsampler], factor: tuple[int, int]
) -> None:
    downsampler, size = build(factor), (5 * factor[0], 4 * factor[1])
    maps, homographies = torch.randn(2, 3, *size, dtype=torch.float64), far_views(2, 6, size)
    views = downsampler(maps, homographies)
    assert views.shape == (2, 6, 3, 5, 4)
    for i in range(6):
        warped = warp(maps, homographies[:, i], size)
        torch.testing.assert_close(views[:, i], plain(downsampler, warped))


def test_what_lies_behind_the_horizon_is_finite_too() -> None:
    homography = torch.eye(3, dtype=torch.float64)[None, None].clone()
    homography[..., 2, 0] = 4
    maps = torch.randn(1, 3, 4, 6)
    views = trained(3, (2, 2)).float()(maps, homography)
    assert views.isfinite().all()
    assert views.abs().max() <= maps.abs().max()


def test_its_gradients_are_exact() -> None:
    downsampler, homographies = trained(2, (2, 3)), far_views(2, 2, (4, 6))
    maps = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    logit, bias = (p.detach().clone().requires_grad_() for p in downsampler.parameters())

    def run(maps: Tensor, logit: Tensor, bias: Tensor) -> Tensor:
        parameters = {"logit": logit, "tap_bias": bias}
        return torch.func.functional_call(downsampler, parameters, (maps, homographies))

    assert torch.autograd.gradcheck(run, (maps, logit, bias))


def test_no_view_of_the_size_of_the_map_is_built() -> None:
    downsampler, sizes = AttentionDownsampler(256, (2, 2)), []
    maps = torch.randn(1, 256, 16, 16, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        downsampler(maps, far_views(1, 5, (16, 16)))
    assert max(sizes) == maps.numel()  # the map itself, and no five of them


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (3, 2), (4, 5)])
def test_without_logits_and_with_the_cell_as_window_it_is_the_box_average(
    factor: tuple[int, int],
) -> None:
    maps = torch.randn(2, 3, 3 * factor[0], 4 * factor[1])
    down = plain(uniform(3, factor, factor), maps)
    torch.testing.assert_close(down, plain(BoxDownsampler(factor), maps))
    cells = maps.unflatten(3, (4, factor[1])).unflatten(2, (3, factor[0]))
    torch.testing.assert_close(down, cells.mean((3, 5)))


def test_the_box_average_undoes_nearest_upsampling() -> None:
    low = torch.randn(2, 3, 3, 4)
    high = low.repeat_interleave(2, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(plain(BoxDownsampler((2, 3)), high), low)


@pytest.mark.parametrize("factor", FACTORS)
def test_windows_cover_their_cell_and_are_centred_on_it(factor: int) -> None:
    downsampler = AttentionDownsampler(1, (factor, factor))
    assert downsampler.kernel == (2 * factor + factor % 2,) * 2
    places = plain(uniform(2, (factor, factor)), cell_numbers(5 * factor, 5 * factor))[0, :, 2, 2]
    centre = 2 * factor + (factor - 1) / 2
    torch.testing.assert_close(places, torch.tensor([centre, centre]))


@pytest.mark.parametrize("factor", FACTORS)
def test_the_public_windows_are_off_centre_by_half_a_cell_less_half_a_tap(factor: int) -> None:
    # Far enough from the border for its window of 9 and its blur, whatever the factor.
    cell = -(-8 // factor)
    maps = cell_numbers(2 * cell * factor + factor, 2 * cell * factor + factor)
    places = uniform_public(factor)(maps)[0, :, cell, cell]
    centre = cell * factor + (factor - 1) / 2
    offset = torch.full((2,), -(factor - 1) / 2)
    torch.testing.assert_close(places - centre, offset, atol=1e-4, rtol=0)


def test_constants_pass_unchanged_at_borders_too_as_the_public_ones_do_not() -> None:
    constant = torch.tensor([3.0, -1.0]).double().view(1, 2, 1, 1).expand(1, 2, 12, 18)
    down = plain(trained(2, (3, 3)), constant)
    torch.testing.assert_close(down, constant[..., :4, :6])
    public = uniform_public(3)(constant.float())
    assert (public - constant[..., :4, :6]).abs().max() > 1


def test_a_constant_added_to_each_channel_is_added_to_the_result() -> None:
    downsampler = trained(3, (2, 4))
    maps, shift = torch.randn(2, 3, 6, 8).double(), torch.randn(3, 1, 1).double()
    torch.testing.assert_close(plain(downsampler, maps + shift), plain(downsampler, maps) + shift)


def test_it_is_deterministic_in_both_modes_as_the_public_one_is_in_neither() -> None:
    maps = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    downsampler = trained(3, (2, 2))
    assert torch.equal(plain(downsampler.train(), maps), plain(downsampler.eval(), maps))
    torch.manual_seed(0)
    public = PublicDownsampler(3, 2).double().eval()
    assert not torch.equal(public(maps), public(maps))


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_it_starts_near_the_plain_average_of_the_cell(factor: int) -> None:
    weights = AttentionDownsampler(1, (factor, factor)).weights(
        torch.zeros(1, 1, 5 * factor, 5 * factor), torch.eye(3)[None, None]
    )[0, 2, 2]
    kernel = 2 * factor + factor % 2
    offsets = torch.arange(kernel) - (kernel - 1) / 2
    variance = float((weights.sum(1) * offsets**2).sum()) / factor**2
    assert variance == pytest.approx(1 / 12, rel=0.05)  # of a box one cell wide


def test_factors_may_differ_by_axis() -> None:
    assert plain(AttentionDownsampler(2, (1, 3)), torch.randn(2, 2, 4, 15)).shape == (2, 2, 4, 5)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    downsampler, maps = trained(3, (2, 2)), torch.randn(1, 3, 8, 8).bfloat16()
    exact = plain(downsampler, maps.double()).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        down = plain(downsampler.float(), maps)
    assert down.dtype == torch.float32
    torch.testing.assert_close(down, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [(2, 3), (5, 6), (4, 4)])
def test_a_window_that_cannot_be_centred_on_its_cell_is_refused(kernel: tuple[int, int]) -> None:
    with pytest.raises(TeacherError, match=r"kernel: a window of \d taps .* \d cells .*choose"):
        AttentionDownsampler(2, (4, 3), kernel)


@pytest.mark.parametrize("build", [BoxDownsampler, lambda f: AttentionDownsampler(2, f)])
def test_a_map_of_partial_cells_is_refused(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="map of 8 x 7 cells is not a multiple of 2 x 3"):
        plain(build((2, 3)), torch.zeros(1, 2, 8, 7))
