"""The fusion block against its equations written out, and what it promises of its inputs."""

import math

import pytest
import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.upsamplers.fusion import FusionBlock, hidden_dim
from tests.test_teachers_local_attention import dense_attention


def seeded(dims: tuple[int, ...], scale: float | None = 0.5, **options) -> FusionBlock:  # type: ignore[no-untyped-def]
    """A float64 block with LayerScales at `scale`, or as they come where it is None."""
    torch.manual_seed(0)
    block = FusionBlock(dims, **options).double()
    with torch.no_grad():
        for x in (block.attention_scale, block.mlp_scale) if scale is not None else ():
            x.fill_(scale)
    return block


def maps(*dims: int, batch: int = 2, size: tuple[int, int] = (5, 11)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, d, *size, generator=generator).double() for d in dims]


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding, one cell and one pair of channels at a time."""
    out, dim = x.clone(), x.shape[-1]
    for r in range(x.shape[1]):
        for c in range(x.shape[2]):
            for half, position in enumerate((r, c)):
                for j in range(dim // 4):
                    angle = position * 50_000 ** (-2 * j / (dim / 2))
                    turn = complex(math.cos(angle), math.sin(angle))
                    i = half * dim // 2 + 2 * j
                    pair = torch.complex(x[:, r, c, i], x[:, r, c, i + 1]) * turn
                    out[:, r, c, i], out[:, r, c, i + 1] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("position", ["alibi", "rope"])
@pytest.mark.parametrize("norm", [True, False])
def test_the_block_is_its_equations(position: str, norm: bool) -> None:
    block = seeded((8, 12, 4), num_heads=3, window=5, position=position, norm=norm)
    inputs = maps(8, 12, 4)
    x = torch.cat(inputs, dim=1).permute(0, 2, 3, 1)

    def normalised(y: Tensor) -> Tensor:
        spread = (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (y - y.mean(-1, keepdim=True)) / spread if norm else y

    y = normalised(x)
    q, k, v = (y @ m.weight.T for m in (block.q, block.k, block.v))
    if position == "rope":
        q, k = rotated(q), rotated(k)
    slopes = torch.tensor([1 / 2, 1 / 2, 1 / 4]) if position == "alibi" else None
    mixed = dense_attention(*(z.unflatten(-1, (3, 8)) for z in (q, k, v)), 5, slopes)
    x = x + 0.5 * (mixed.flatten(3) @ block.proj.weight.T + block.proj.bias)
    y = normalised(x)
    a, b = (y @ m.weight.T + m.bias for m in (block.gate, block.value))
    y = (a * torch.sigmoid(a) * b) @ block.down.weight.T + block.down.bias
    due = (x[..., :8] + 0.5 * y).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(inputs), due, atol=1e-10, rtol=0)


def test_without_layer_scale_the_first_input_passes_bit_for_bit() -> None:
    block, inputs = seeded((8, 8), scale=0.0, num_heads=4), maps(8, 8)
    assert torch.equal(block(inputs), inputs[0])


def test_a_fresh_block_returns_the_first_input_nearly() -> None:
    inputs = maps(8, 8)
    difference = seeded((8, 8), scale=None, num_heads=4)(inputs) - inputs[0]
    assert 0 < difference.abs().max() < 1e-4


@pytest.mark.parametrize("cell", [(0, 0), (4, 8), (8, 14)])
def test_a_cell_reaches_three_cells_far_and_no_further(cell: tuple[int, int]) -> None:
    block, inputs = seeded((8, 8), num_heads=4), maps(8, 8, batch=1, size=(9, 15))
    before = block(inputs)
    inputs[1][0, :, cell[0], cell[1]] += torch.arange(8).double()
    changed = (block(inputs) != before).any(1)[0]
    rows, columns = torch.arange(9)[:, None], torch.arange(15)
    near = ((rows - cell[0]).abs() <= 3) & ((columns - cell[1]).abs() <= 3)
    assert torch.equal(changed, near)


def test_an_image_is_fused_alike_in_any_batch_which_may_grow_and_shrink() -> None:
    block, inputs = seeded((8, 4), num_heads=4), maps(8, 4, batch=5)
    whole = block(inputs)
    for images in (slice(0, 1), slice(0, 4), slice(2, 3)):
        torch.testing.assert_close(block([x[images] for x in inputs]), whole[images])


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_gradients_are_those_of_finite_differences(position: str) -> None:
    block = seeded((4, 4), num_heads=2, window=3, position=position)
    inputs = [x.requires_grad_() for x in maps(4, 4, batch=1, size=(3, 4))]
    torch.autograd.gradcheck(lambda *x: block(x), inputs)
    block(inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def test_rotated_queries_see_keys_by_their_distance_alone() -> None:
    block = seeded((8, 8), num_heads=4, window=3, position="rope")
    inputs = maps(8, 8, size=(6, 9))
    shifted = block([x.roll((1, 2), dims=(2, 3)) for x in inputs])
    torch.testing.assert_close(shifted[..., 3:5, 4:8], block(inputs)[..., 2:4, 2:6])


def test_a_transposed_image_gives_a_transposed_map_when_the_heads_of_each_pair_are_swapped() -> (
    None
):
    block, inputs = seeded((8, 8), num_heads=4), maps(8, 8)
    due = block(inputs).mT
    swapped = torch.arange(16).view(4, 4)[[1, 0, 3, 2]].flatten()
    with torch.no_grad():
        for linear in (block.q, block.k, block.v):
            linear.weight.copy_(linear.weight[swapped])
        block.proj.weight.copy_(block.proj.weight[:, swapped])
    torch.testing.assert_close(block([x.mT for x in inputs]), due)


def test_the_output_is_channels_last_whatever_the_inputs_are() -> None:
    block = seeded((8, 8), num_heads=4)
    last = [x.contiguous(memory_format=torch.channels_last) for x in maps(8, 8)]
    for inputs in (maps(8, 8), last):
        assert block(inputs).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(block(last), block(maps(8, 8)))


def test_autocast_returns_the_type_of_the_first_input() -> None:
    block, inputs = seeded((8, 8), num_heads=4).float(), [x.float() for x in maps(8, 8)]
    due = block(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        came = block(inputs)
    assert came.dtype == torch.float32
    torch.testing.assert_close(came, due, atol=0.03, rtol=0.03)
    assert not torch.equal(came, due)


@pytest.mark.parametrize(
    "channels, hidden", [(768, 4096), (1024, 5464), (1152, 6144), (1280, 6832)]
)
def test_hidden_widths_are_those_of_the_public_code(channels: int, hidden: int) -> None:
    assert hidden_dim(2 * channels) == hidden


@torch.no_grad()
def test_a_residual_of_several_inputs_is_their_mean_and_adds_the_same() -> None:
    options = {"num_heads": 4, "scale": 0.5}
    first, mean = (seeded((8, 4, 8), **options, residual=which) for which in ((0,), (0, 2)))
    inputs = maps(8, 4, 8)
    for block in (first, mean):
        block.attention_scale.zero_()
    torch.testing.assert_close(mean(inputs), first(inputs) + (inputs[2] - inputs[0]) / 2)


def test_a_narrow_block_has_a_third_fewer_weights() -> None:
    assert [hidden_dim(384, ratio) for ratio in (4, 2, 1, 0.001)] == [1024, 512, 256, 8]
    with torch.device("meta"):
        whole, half = (FusionBlock([192, 192], mlp_ratio=ratio) for ratio in (4, 2))
    sizes = [sum(p.numel() for p in block.parameters()) for block in (whole, half)]
    assert sizes == [1_577_600, 1_085_056]
    assert half.gate.out_features == half.value.out_features == half.down.in_features == 512


@pytest.mark.parametrize("channels, millions", [(768, 25.2), (1024, 44.8), (1152, 56.6)])
def test_parameters_are_counted_by_the_closed_form(channels: int, millions: float) -> None:
    with torch.device("meta"):
        block = FusionBlock([channels, channels])
    count = sum(p.numel() for p in block.parameters())
    c, d, h = channels, 2 * channels, hidden_dim(2 * channels)
    assert count == 4 * d * d + d + 2 * 2 * d + d + 2 * d * h + 2 * h + h * c + c + c
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_block_walks_through_without_data() -> None:
    with torch.device("meta"):
        block, inputs = FusionBlock([768, 768]), torch.empty(1, 768, 81, 54)
    assert block([inputs, inputs]).shape == (1, 768, 81, 54)


def test_what_cannot_be_built_is_explained() -> None:
    with pytest.raises(
        TeacherError, match="16 heads do not divide the 102 channels.*nearest.* is 17"
    ):
        FusionBlock([96, 6])
    with pytest.raises(TeacherError, match="window: expected an odd number of cells.* got 6"):
        FusionBlock([8, 8], window=6)
    with pytest.raises(TeacherError, match="rope needs a multiple of 4 .* got 18; use alibi"):
        FusionBlock([9, 9], num_heads=3, position="rope")


def test_other_channels_than_those_it_was_built_for_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs of \(8, 4\) channels: expected \(8, 8\)"):
        seeded((8, 8), num_heads=4)(maps(8, 4))
