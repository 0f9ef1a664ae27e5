"""The Triton kernel of the local gather against the float64 form, interpreted where no GPU is."""

import pytest
import torch

from teachers.upsamplers.local_gather import local_gather

pytest.importorskip("triton", reason="needs Triton, which is for Linux: make test installs it")

from teachers.upsamplers import local_gather_kernels as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Fewer columns and channels than a program owns, and more; windows that are no squares.
@pytest.mark.parametrize("width, dim, window", [(3, 5, (2, 3)), (19, 130, (1, 4))])
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_it_is_the_sum_in_float64(
    width: int, dim: int, window: tuple[int, int], dtype: torch.dtype, most: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, dim, 6, 7, generator=generator).to(dtype)
    weights = torch.randn(2, 4, width, *window, generator=generator)
    rows = torch.randint(0, 7 - window[0], (4,), generator=generator)
    columns = torch.randint(0, 8 - window[1], (width,), generator=generator)
    table = source.permute(0, 2, 3, 1).reshape(-1, dim).contiguous()
    places = (rows.to(DEVICE), columns.to(DEVICE))
    came = kernels.gather(table.to(DEVICE), weights.to(DEVICE), *places, (6, 7))
    due = local_gather(source.double(), weights.double(), rows, columns)
    assert came.dtype == dtype
    came = came.cpu().double().view(2, 4, width, dim).permute(0, 3, 1, 2)
    assert (came - due).norm() / due.norm() < most
