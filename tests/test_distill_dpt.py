"""The DPT head: grids, gradients, and that nothing shifts the map."""

import pytest
import torch
from torch import Tensor, nn

from distill.evaluation.dpt import DPTHead


def test_maps_of_one_grid_are_fused_on_four_times_the_grid() -> None:
    maps = [torch.rand(2, dim, 3, 5) for dim in (4, 4, 4, 4)]
    assert DPTHead([4] * 4, 6, 8)(*maps).shape == (2, 6, 12, 20)


def test_maps_of_a_cnn_stay_on_their_own_grids() -> None:
    maps = [torch.rand(2, dim, 16 // s, 24 // s) for dim, s in ((3, 1), (4, 2), (5, 4), (6, 8))]
    assert DPTHead([3, 4, 5, 6], 1, 8)(*maps).shape == (2, 1, 16, 24)


def test_every_layer_and_every_parameter_matters() -> None:
    torch.manual_seed(0)
    head = DPTHead([4] * 4, 2, 8)
    maps = [torch.rand(2, 4, 3, 5, requires_grad=True) for _ in range(4)]
    head(*maps).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in maps)
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias before a batch norm would be without.
    assert without == []


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_mirrored_map_gives_the_mirrored_prediction(axis: int) -> None:
    """Half-pixel centres: corners aligned, or one padded side, would shift the map."""
    torch.manual_seed(0)
    head = DPTHead([4] * 4, 2, 8).eval()
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data + module.weight.data.flip(axis)
    maps = [torch.rand(1, 4, 5, 6) for _ in range(4)]
    mirrored: list[Tensor] = [each.flip(axis) for each in maps]
    assert torch.allclose(head(*mirrored), head(*maps).flip(axis), atol=1e-5)
