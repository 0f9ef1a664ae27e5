"""The precision that softmax, normalisation and standardisation need, and what kernels take."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision, as autocast leaves it, becomes float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switches the caller's autocast off on the device of a tensor."""
    if tensor.is_meta:  # autocast does not know it
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels of this package run on it; they come with a GPU's PyTorch.

    float64 is for checks, and has none.
    """
    return tensor.is_cuda and tensor.dtype != torch.float64
