"""Makes torchvision importable where its compiled operators cannot be loaded.

timm and open_clip import torchvision. With a CPU build of torch and a CUDA build of torchvision,
importing it fails with `operator torchvision::nms does not exist`. This module then declares the
two schemas that the import needs. `torchvision::nms` also gets a plain implementation for CPU
tensors, because detectors need it.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DECLARED: list[torch.library.Library] = []  # deleting a Library removes its definitions


def _compiled_operators_load() -> bool:
    """Whether torchvision's shared library can be loaded, or torchvision is not installed."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    libraries = sorted(Path(found.origin).parent.glob("_C*"))
    if not libraries:
        return False
    try:
        ctypes.CDLL(str(libraries[0]))
    except OSError:
        return False
    return True


@cache
def declare_missing_operators() -> bool:
    """Declares `torchvision::nms` and `qnms` if they are missing; returns whether it did."""
    if hasattr(torch.ops.torchvision, "nms") or _compiled_operators_load():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SCHEMA}")
    library.impl("nms", plain_nms, "CPU")
    _DECLARED.append(library)
    return True


def allow_plain_nms() -> None:
    """Lets `torchvision.ops.nms` call the plain implementation if there is no compiled one.

    Call it before a detector runs: torchvision's functions raise without its compiled library.
    Others, such as `roi_pool`, still do.
    """
    if declare_missing_operators():
        from torchvision.ops import boxes

        boxes._assert_has_ops = lambda: None


def plain_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: removes a box that overlaps a kept one of higher score.

    Args:
        dets: (N, 4) boxes, left, top, right, bottom.
        scores: (N,).
        iou_threshold: largest allowed intersection over union.

    Returns:
        (M,) int64, indices of the kept boxes in order of score; of equal scores, the first.
    """
    order = scores.argsort(descending=True, stable=True)
    low, high = dets[order].split(2, dim=1)
    areas = (high - low).prod(1)
    left, kept = torch.arange(len(order)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = torch.minimum(high[left], high[best]) - torch.maximum(low[left], low[best])
        shared = sides.clamp(min=0).prod(1)
        covered = shared / (areas[left] + areas[best] - shared) > iou_threshold
        left = left[~covered]
    return order[torch.stack(kept)] if kept else order
