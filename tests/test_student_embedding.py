"""Patches, cropped positions, class tokens and registers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from student.embedding import Embedding, crop_positions, fit_positions, sample_viewports

CPU = torch.device("cpu")


def embedding(**options: Any) -> Embedding:
    sizes = {"patch_size": 4, "table_side": 6, "num_class_tokens": 2, "num_registers": 3}
    torch.manual_seed(0)
    return Embedding(8, **(sizes | options))


def test_a_patch_is_flattened_by_channel_then_row_then_column() -> None:
    module = embedding().eval()
    images = torch.randn(2, 3, 8, 12)
    kernel = module.projection.weight.detach().view(8, 3, 4, 4)
    conv = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    positions = fit_positions(module.positions, (2, 3))
    torch.testing.assert_close(module(images)[:, 5:], conv + positions)


def test_class_tokens_then_registers_stand_in_front_and_get_no_position() -> None:
    module = embedding()
    expected = torch.cat([module.class_tokens, module.registers])
    for mode in (True, False):
        assert torch.equal(module.train(mode)(torch.randn(2, 3, 8, 12))[1, :5], expected)


def test_without_registers_there_is_no_empty_parameter() -> None:
    module = embedding(num_registers=0)
    assert {name for name, _ in module.named_parameters()} == {
        "positions",
        "class_tokens",
        "projection.weight",
    }
    assert module(torch.randn(1, 3, 4, 8)).shape == (1, 2 + 2, 8)


def test_eval_uses_the_table_itself_on_a_grid_of_its_size() -> None:
    table = torch.randn(6, 6, 8)
    assert torch.equal(fit_positions(table, (6, 6)), table.flatten(0, 1))


@pytest.mark.parametrize("grid", [(2, 5), (5, 2), (6, 3), (4, 6), (3, 11), (9, 9)])
def test_eval_uses_the_top_left_corner_of_the_square_that_holds_the_grid(
    grid: tuple[int, int],
) -> None:
    table = torch.randn(6, 6, 8)
    square = F.interpolate(
        table.permute(2, 0, 1)[None], (max(grid),) * 2, mode="bilinear", align_corners=False
    )
    corner = square[0, :, : grid[0], : grid[1]].flatten(1).T
    torch.testing.assert_close(fit_positions(table, grid), corner)


def test_resizing_a_two_cell_table_to_four_gives_the_hand_computed_quarters() -> None:
    table = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[..., None]
    row = fit_positions(table, (1, 4)).flatten()
    torch.testing.assert_close(row, torch.tensor([0, 0.25, 0.75, 1]))


def reference_crop(table: Tensor, origin: Tensor, extent: Tensor, grid: tuple[int, int]) -> Tensor:
    """The statement of the method: grid_sample with aligned corners and zeros outside."""
    ys, xs = (
        origin[:, axis, None] + extent[:, axis, None] * torch.linspace(0, 1, cells).to(table)
        for axis, cells in enumerate(grid)
    )
    points = torch.stack(
        [xs[:, None, :].expand(-1, *grid), ys[:, :, None].expand(-1, *grid)], dim=-1
    )
    source = table.permute(2, 0, 1).expand(len(origin), -1, -1, -1)
    read = F.grid_sample(
        source, 2 * points - 1, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return read.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid", [(3, 5), (7, 2), (1, 4), (6, 6)])
def test_a_window_of_the_table_is_read_as_grid_sample_reads_it(grid: tuple[int, int]) -> None:
    torch.manual_seed(1)
    table = torch.randn(6, 6, 8, requires_grad=True)
    origin, extent = sample_viewports(5, CPU)
    ours = crop_positions(table, origin, extent, grid)
    slow = table.detach().double().requires_grad_()
    theirs = reference_crop(slow, origin.double(), extent.double(), grid)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight.double()).sum().backward()
    torch.testing.assert_close(table.grad, slow.grad.float(), atol=1e-5, rtol=0)


def test_the_whole_window_on_a_grid_of_the_tables_size_is_the_table() -> None:
    table = torch.randn(6, 6, 8)
    whole = crop_positions(table, torch.zeros(1, 2), torch.ones(1, 2), (6, 6))
    torch.testing.assert_close(whole[0], table.flatten(0, 1), atol=1e-5, rtol=0)


def test_windows_lie_in_the_table_and_have_the_sides_of_the_method() -> None:
    torch.manual_seed(0)
    origin, extent = sample_viewports(20_000, CPU)
    assert origin.min() >= 0
    assert (origin + extent).max() <= 1 + 1e-6
    smallest = math.sqrt(0.1) * 0.75
    assert smallest <= extent.min() < smallest + 0.01
    assert extent.max() == 1
    assert len(torch.cat([origin, extent], dim=1).unique(dim=0)) == 20_000
    # Where nothing is clamped, the sides' product is the squared side, uniform in its root, and
    # their ratio the aspect, squared, uniform in its logarithm.
    free = (extent < 0.75).all(dim=1)
    assert free.any()
    aspect = (extent[:, 1] / extent[:, 0])[free].log() / 2
    assert aspect.abs().max() <= math.log(4 / 3) + 1e-6
    assert abs(aspect[extent.prod(1)[free] < 0.3].mean()) < 0.01
    small = (extent.prod(1) < 0.25).float().mean()  # P(side < 0.5)
    assert abs(small - (0.5 - math.sqrt(0.1)) / (1 - math.sqrt(0.1))) < 0.015


def test_training_gives_each_image_its_own_window_and_eval_none() -> None:
    module = embedding()
    same = torch.randn(1, 3, 8, 12).expand(4, -1, -1, -1)
    patches = module.train()(same)[:, 5:]
    assert len(patches.flatten(1).unique(dim=0)) == 4
    patches = module.eval()(same)[:, 5:]
    assert len(patches.flatten(1).unique(dim=0)) == 1


def test_the_seed_decides_the_windows() -> None:
    module, images = embedding().train(), torch.randn(2, 3, 8, 12)
    torch.manual_seed(3)
    first = module(images)
    second = module(images)
    torch.manual_seed(3)
    assert torch.equal(module(images), first)
    assert not torch.equal(second, first)


def test_position_arithmetic_is_float32_in_a_bfloat16_module() -> None:
    module = embedding().bfloat16().eval()
    module.projection.weight.data.zero_()
    tokens = module(torch.zeros(1, 3, 12, 20))[0, 5:]
    expected = fit_positions(module.positions.float(), (3, 5)).bfloat16()
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, expected)


def test_position_dropout_takes_whole_maps_away_from_some_images_in_training_only() -> None:
    module = embedding(position_dropout=0.25)
    module.projection.weight.data.zero_()
    images = torch.zeros(2000, 3, 8, 12)
    torch.manual_seed(0)
    tokens = module.train()(images)
    assert torch.equal(tokens[:, :5], embedding()(images)[:, :5])  # class tokens and registers
    gone = ~tokens[:, 5:].flatten(1).any(1)
    assert abs(gone.double().mean() - 0.25) < 0.04
    torch.manual_seed(0)
    module.position_dropout = 0.0
    assert torch.equal(tokens[~gone], module(images)[~gone])  # all of a map, and not rescaled
    positions = fit_positions(module.positions.float(), (2, 3))
    assert torch.equal(module.eval()(images[:5])[:, 5:], positions.expand(5, -1, -1))


def test_without_position_dropout_no_number_is_drawn_for_it() -> None:
    images = torch.randn(2, 3, 8, 12)
    torch.manual_seed(3)
    sample_viewports(2, CPU)
    first = torch.rand(1)
    torch.manual_seed(3)
    module = embedding()
    torch.manual_seed(3)
    module.train()(images)
    assert torch.equal(torch.rand(1), first)
