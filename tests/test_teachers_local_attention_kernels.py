"""The Triton kernels of local attention against the float64 form, interpreted where no GPU is."""

import pytest
import torch
from torch import Tensor

from teachers.upsamplers.local_attention import alibi_slopes, local_attention

pytest.importorskip("triton", reason="needs Triton, which is for Linux: make test installs it")

from teachers.upsamplers import local_attention_kernels as kernels

pytestmark = pytest.mark.long  # Triton interprets slowly

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(4)]


def by_kernels(tensors: list[Tensor], slopes: Tensor, window: int) -> list[Tensor]:
    """Output and gradients."""
    *qkv, d_out = tensors
    slopes = slopes.to(DEVICE)
    outputs = kernels.attend(*qkv, slopes, window // 2)
    gradients = kernels.differentiate(tuple(qkv), slopes, outputs, d_out, window // 2)
    return [outputs[0], *gradients]


def in_float64(tensors: list[Tensor], slopes: Tensor, window: int) -> list[Tensor]:
    """The same by the form that tests/test_teachers_local_attention.py checks."""
    *qkv, d_out = (x.cpu().double() for x in tensors)
    leaves = [x.requires_grad_() for x in qkv]
    out = local_attention(*leaves, window=window, slopes=slopes.double())
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def errors(came: list[Tensor], due: list[Tensor]) -> list[float]:
    pairs = zip(came, due, strict=True)
    return [float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs]


# Smaller than a tile, no multiple of one, H != W; channels that are no power of two; both parities.
@pytest.mark.parametrize(
    "h, w, heads, dim, window",
    [(1, 3, 2, 6, 7), (9, 5, 3, 24, 7), (5, 17, 2, 16, 3), (8, 8, 1, 4, 5)],
)
def test_forward_and_backward_are_those_of_float64(
    h: int, w: int, heads: int, dim: int, window: int
) -> None:
    tensors, slopes = random(2, h, w, heads, dim), alibi_slopes(heads)
    came, due = by_kernels(tensors, slopes, window), in_float64(tensors, slopes, window)
    assert max(errors(came, due)) < 1e-6


def test_half_precision_adds_up_in_float32() -> None:
    dtype = (
        torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    )  # the interpreter has no bf16
    tensors, slopes = random(1, 9, 10, 2, 24, dtype=dtype), alibi_slopes(2)
    came = by_kernels(tensors, slopes, 7)
    assert all(x.dtype == dtype for x in came)
    assert max(errors(came, in_float64(tensors, slopes, 7))) < torch.finfo(dtype).eps


def test_logits_of_hundreds_do_not_overflow() -> None:
    q, k, v, d_out = random(1, 6, 9, 2, 8)
    tensors, slopes = [30 * q, 30 * k, v, d_out], alibi_slopes(2)
    assert max(errors(by_kernels(tensors, slopes, 5), in_float64(tensors, slopes, 5))) < 1e-4


def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, slopes = random(1, 9, 11, 2, 8), alibi_slopes(2)
    due = in_float64(tensors, slopes, 7)
    monkeypatch.setattr(kernels, "_TILES", (4,))
    monkeypatch.setattr(kernels, "_KEYS", (16,))
    assert max(errors(by_kernels(tensors, slopes, 7), due)) < 1e-6


def test_strides_do_not_matter() -> None:
    tensors, slopes = random(1, 5, 9, 2, 8), alibi_slopes(2)
    due = in_float64(tensors, slopes, 3)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert max(errors(by_kernels(turned, slopes, 3), due)) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("dim", [24, 144, 160])  # the small CLIP's; SO400M's; ViT-H's
def test_a_gpu_runs_the_kernels_behind_the_same_function(
    dtype: torch.dtype, most: float, dim: int
) -> None:
    *qkv, d_out = random(2, 27, 30, 4, dim, dtype=dtype)
    slopes = alibi_slopes(4)
    leaves = [x.requires_grad_() for x in qkv]
    out = local_attention(*leaves, window=7, slopes=slopes.to(DEVICE))
    came = [out.detach(), *torch.autograd.grad(out, leaves, d_out, retain_graph=True)]
    assert max(errors(came, in_float64([*qkv, d_out], slopes, 7))) < most
    again = torch.autograd.grad(out, leaves, d_out)
    assert all(torch.equal(a, b) for a, b in zip(came[1:], again, strict=True))
