"""Local attention against a dense float64 attention under a mask, forward and backward."""

import pytest
import torch
from torch import Tensor

from teachers.upsamplers import local_attention_strips
from teachers.upsamplers.local_attention import alibi_slopes, local_attention

# Smaller than the window, smaller than a strip, no multiple of one, H != W both ways.
SIZES = [(1, 1), (2, 1), (1, 9), (5, 7), (13, 20), (17, 8), (3, 25)]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int, slopes: Tensor | None) -> Tensor:
    """All pairs of cells, those outside the window masked."""
    _, h, w, heads, dim = q.shape
    cells = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    rows, columns = (cells[:, None] - cells).abs().unbind(-1)
    bias = torch.zeros(heads, h * w, h * w, dtype=q.dtype)
    if slopes is not None:
        for head, slope in enumerate(slopes.tolist()):
            bias[head] = -slope * (columns if head % 2 else rows)
    bias = bias.masked_fill((rows > window // 2) | (columns > window // 2), -torch.inf)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    mixed = (q @ k.mT / dim**0.5 + bias).softmax(-1) @ v
    return mixed.transpose(1, 2).unflatten(1, (h, w))


def random(*shape: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(count)
    ]


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_dense_attention_under_a_mask_forward_and_backward(
    size: tuple[int, int], window: int
) -> None:
    q, k, v, d_out = random(2, *size, 4, 6, count=4)
    slopes = alibi_slopes(4)
    ours = local_attention(q, k, v, window=window, slopes=slopes)
    due = dense_attention(q, k, v, window, slopes)
    torch.testing.assert_close(ours, due, atol=1e-12, rtol=0)
    ours_d = torch.autograd.grad(ours, (q, k, v), d_out)
    due_d = torch.autograd.grad(due, (q, k, v), d_out)
    torch.testing.assert_close(ours_d, due_d, atol=1e-12, rtol=0)


@pytest.mark.parametrize("logits", [1, 6000, 40_000, 1 << 30])
def test_how_it_is_cut_in_parts_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    q, k, v = random(3, 9, 11, 5, 4)
    monkeypatch.setattr(local_attention_strips, "_LOGITS_CPU", logits)
    ours = local_attention(q, k, v, window=5)
    due = dense_attention(q, k, v, 5, None)
    torch.testing.assert_close(ours, due, atol=1e-12, rtol=0)
    d_ours = torch.autograd.grad(ours.square().sum(), (q, k, v))
    d_due = torch.autograd.grad(due.square().sum(), (q, k, v))
    torch.testing.assert_close(d_ours, d_due, atol=1e-12, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = random(1, 2, 9, 2, 2)
    torch.autograd.gradcheck(
        lambda *qkv: local_attention(*qkv, window=3, slopes=alibi_slopes(2)), (q, k, v)
    )


def test_float32_is_exact_to_rounding_with_logits_of_hundreds() -> None:
    q, k, v = random(1, 12, 19, 4, 8, dtype=torch.float32)
    large = [30 * q, 30 * k, v]
    ours = local_attention(*large, window=7, slopes=alibi_slopes(4))
    exact = [x.double() for x in large]
    due = dense_attention(*exact, 7, alibi_slopes(4))
    torch.testing.assert_close(ours.double(), due, atol=2e-4, rtol=0)
    d_ours = torch.autograd.grad(ours.sum(), large)
    d_due = torch.autograd.grad(due.sum(), exact)
    for came, expected in zip(d_ours, d_due, strict=True):
        torch.testing.assert_close(came.double(), expected, atol=5e-3, rtol=1e-3)


def test_bfloat16_is_rounded_at_the_ends_only() -> None:
    q, k, v = random(1, 9, 10, 2, 8, dtype=torch.bfloat16)
    ours = local_attention(q, k, v, window=7)
    due = local_attention(q.float(), k.float(), v.float(), window=7)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, due.bfloat16())
    gradients = torch.autograd.grad(ours.float().sum(), (q, k, v))
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = random(1, 6, 9, 2, 8, dtype=torch.float32)
    due = local_attention(q, k, v, window=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(local_attention(q, k, v, window=7), due)


def test_strides_do_not_matter() -> None:
    qkv = random(2, 6, 9, 3, 4, 5, count=1)[0]  # q, k and v side by side
    q, k, v = qkv.unbind(3)
    due = dense_attention(q, k, v, 3, None)
    ours = local_attention(q, k, v, window=3)
    torch.testing.assert_close(ours, due, atol=1e-12, rtol=0)
    d_ours, d_due = (torch.autograd.grad(y.square().sum(), qkv)[0] for y in (ours, due))
    torch.testing.assert_close(d_ours, d_due, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cell", [(0, 0), (6, 9), (12, 19), (3, 8), (11, 0)])
def test_a_cell_reaches_three_cells_far_and_no_further(cell: tuple[int, int]) -> None:
    q, k, v = (x.detach() for x in random(1, 13, 20, 2, 4))
    before = local_attention(q, k, v, window=7)
    for x in (k, v):
        x[0, cell[0], cell[1]] += 1
    changed = (local_attention(q, k, v, window=7) != before).flatten(3).any(-1)[0]
    rows, columns = torch.arange(13)[:, None], torch.arange(20)
    near = ((rows - cell[0]).abs() <= 3) & ((columns - cell[1]).abs() <= 3)
    assert torch.equal(changed, near)


def test_images_of_a_batch_do_not_mix() -> None:
    q, k, v = random(5, 6, 11, 2, 4, dtype=torch.float32)
    batch = local_attention(q, k, v, window=7)
    for i in (0, 4):
        alone = local_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], window=7)
        torch.testing.assert_close(batch[i : i + 1], alone)


def test_equal_keys_give_the_mean_over_the_part_of_the_window_inside_the_map() -> None:
    ones = torch.ones(1, 5, 12, 1, 1).double()
    v = torch.arange(60.0).double().view(1, 5, 12, 1, 1)
    out = local_attention(ones, ones, v, window=7)[0, :, :, 0, 0]
    maps = v[0, :, :, 0, 0]
    assert out[0, 0] == pytest.approx(maps[:4, :4].mean())
    assert out[2, 6] == pytest.approx(maps[:, 3:10].mean())
    assert out[4, 11] == pytest.approx(maps[1:, 8:].mean())


def test_slopes_halve_every_second_head() -> None:
    assert alibi_slopes(5).tolist() == [1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8]
    assert alibi_slopes(16)[-2:].tolist() == [2**-8, 2**-8]


def test_a_transposed_map_swaps_the_heads_of_each_pair() -> None:
    qkv = random(1, 7, 12, 4, 3)
    pairs = torch.tensor([1, 0, 3, 2])
    slopes = alibi_slopes(4)
    due = local_attention(*qkv, window=5, slopes=slopes)
    turned = [x.transpose(1, 2)[:, :, :, pairs] for x in qkv]
    ours = local_attention(*turned, window=5, slopes=slopes)
    torch.testing.assert_close(ours[:, :, :, pairs].transpose(1, 2), due)
    plain = local_attention(*(x.transpose(1, 2) for x in qkv), window=5, slopes=slopes)
    assert (plain.transpose(1, 2) - due).abs().max() > 1e-3


def test_it_runs_without_data() -> None:
    q = torch.empty(2, 5, 9, 4, 8, device="meta")
    assert local_attention(q, q, q, window=7, slopes=alibi_slopes(4).to("meta")).shape == q.shape


def test_wrong_arguments_are_named() -> None:
    q, k, v = random(1, 3, 3, 2, 4)
    with pytest.raises(ValueError, match="window 4: expected an odd number"):
        local_attention(q, k, v, window=4)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 2, 4\).*expected \(B, h, w, heads, d\)"):
        local_attention(q, k[:, 1:], v, window=3)
    with pytest.raises(ValueError, match=r"slopes of shape \(3,\): expected \(2,\)"):
        local_attention(q, k, v, window=3, slopes=alibi_slopes(3))
