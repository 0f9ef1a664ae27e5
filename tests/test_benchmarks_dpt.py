"""The DPT head: grids, gradients, and that nothing shifts the map."""

import pytest
import torch
from torch import Tensor, nn

from distill.benchmarks.dense.dpt import DPTHead


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
def test_a_linear_ramp_stays_where_it_is(axis: int) -> None:
    """With convolutions that do nothing, four maps are added: half-pixel centres throughout."""
    head = DPTHead([2] * 4, 2, 2).eval()
    for unit in (*head.skip, *head.fuse):
        nn.init.zeros_(unit.inner[-1].weight)
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def ramp(height: int, width: int) -> Tensor:
        length = (height, width)[axis]
        along = (torch.arange(length) + 0.5) / length
        return along.view((-1, 1) if axis == -2 else (1, -1)).expand(1, 2, height, width)

    came = head(*[ramp(8, 12)] * 4)
    inner = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(came[inner], 4 * ramp(32, 48)[inner], atol=1e-4)
