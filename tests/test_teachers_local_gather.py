"""The windowed sum, against one that copies every window."""

import pytest
import torch
from torch import Tensor

from teachers.upsamplers.local_gather import local_gather

# Not in order, some twice, and the last row and column of the source are read by nobody.
ROWS, COLUMNS = torch.tensor([3, 0, 0, 2, 1]), torch.tensor([0, 4, 1, 1])
KERNEL = (2, 3)


def slow(source: Tensor, weights: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The definition, window by window."""
    kh, kw = weights.shape[3:]
    out = source.new_zeros(*source.shape[:2], len(rows), len(columns))
    for y, top in enumerate(rows.tolist()):
        for x, left in enumerate(columns.tolist()):
            window = source[:, :, top : top + kh, left : left + kw]
            out[:, :, y, x] = (weights[:, None, y, x] * window).sum((2, 3))
    return out


def inputs(dtype: torch.dtype = torch.float64, depth: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    source = torch.randn(2, depth, 6, 8, dtype=dtype)
    return source, torch.randn(2, len(ROWS), len(COLUMNS), *KERNEL, dtype=dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_weighted_sum_of_each_window(layout: torch.memory_format) -> None:
    source, weights = inputs()
    out = local_gather(source.to(memory_format=layout), weights, ROWS, COLUMNS)
    torch.testing.assert_close(out, slow(source, weights, ROWS, COLUMNS))
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_its_gradients_are_those_of_the_definition(layout: torch.memory_format) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    assert torch.autograd.gradcheck(lambda s, w: local_gather(s, w, ROWS, COLUMNS), leaves)
    back = torch.randn(2, 3, len(ROWS), len(COLUMNS), dtype=torch.float64)
    expected = torch.autograd.grad(slow(*leaves, ROWS, COLUMNS), leaves, back)
    ours = local_gather(*leaves, ROWS, COLUMNS)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, back.to(memory_format=layout)), expected
    )
    assert (expected[0][:, :, 5] == 0).all(), "the row that nobody reads"


def test_a_source_that_needs_no_gradient_gets_none() -> None:
    source, weights = inputs()
    local_gather(source, weights.requires_grad_(), ROWS, COLUMNS).sum().backward()
    assert source.grad is None
    assert weights.grad is not None


def test_a_gradient_that_is_one_number_expanded_is_read_right() -> None:
    source, weights = inputs()
    leaf = source.clone().requires_grad_()
    local_gather(leaf, weights, ROWS, COLUMNS).sum().backward()
    other = source.clone().requires_grad_()
    slow(other, weights, ROWS, COLUMNS).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def half_precision_agrees(device: str) -> None:
    """bfloat16 features with float32 weights, as under autocast."""
    source, weights = inputs(torch.float32, depth=64)
    expected = [t.clone().requires_grad_() for t in (source.bfloat16().float(), weights)]
    slow(*expected, ROWS, COLUMNS).square().sum().backward()
    leaves = [source.bfloat16().to(device), weights.to(device)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = local_gather(*leaves, ROWS, COLUMNS)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for leaf, other in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        error = (leaf.grad.float().cpu() - other.grad).norm() / other.grad.norm()
        assert error < 1e-2


def test_bfloat16_features_take_float32_weights() -> None:
    half_precision_agrees("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_does_the_same_in_bfloat16_and_repeats_itself() -> None:
    half_precision_agrees("cuda")
    source, weights = (t.cuda().requires_grad_() for t in inputs(torch.float32))
    first, again = (
        torch.autograd.grad(local_gather(source, weights, ROWS, COLUMNS).square().sum(), source)[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)


def test_a_window_that_leaves_the_map_is_refused() -> None:
    source, weights = inputs()
    with pytest.raises(ValueError, match=r"rows from 0 to 5: a window of 2 on a map of 6 cells"):
        local_gather(source, weights, ROWS + (ROWS == 3) * 2, COLUMNS)
    with pytest.raises(ValueError, match=r"columns from -1 to 3: .* must start in \[0, 5\]"):
        local_gather(source, weights, ROWS, COLUMNS - 1)


def test_weights_of_another_grid_are_refused() -> None:
    source, weights = inputs()
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 2, 3\) for 2 maps, 4 rows and 5 columns"):
        local_gather(source, weights, COLUMNS, ROWS)
    with pytest.raises(ValueError, match="for 1 maps"):
        local_gather(source[:1], weights, ROWS, COLUMNS)
