"""Precision of softmax, normalisation and standardisation, and the inputs that kernels accept."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for half precision, else the tensor's own dtype."""
    return torch.promote_types(tensor.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Casts half precision to float32; float32 and float64 stay."""
    return tensor.to(compute_dtype(tensor))


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Disables autocast on the device of a tensor."""
    if tensor.is_meta:  # autocast does not support it
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels of this package run on a tensor: on a GPU, except for float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64
