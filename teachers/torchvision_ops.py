"""Lets a CPU build of torch live beside a CUDA build of torchvision.

timm and open_clip import torchvision. Where its compiled operators cannot be loaded, torchvision's
own Python code fails at import with `operator torchvision::nms does not exist`. We then declare
the two schemas that its import looks up. `torchvision::nms` gets a plain implementation for CPU
tensors too, because detectors need it: it is there for CPU installs, and never where the compiled
one is.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DECLARED: list[torch.library.Library] = []  # a Library undoes its definitions when collected


def _compiled_operators_load() -> bool:
    """Whether torchvision's shared library (or no torchvision at all) leaves nothing to repair."""
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
    """Declares `torchvision::nms` and `torchvision::qnms` when, and only when, they are missing.

    Returns:
        True where the schemas were declared here.
    """
    if hasattr(torch.ops.torchvision, "nms") or _compiled_operators_load():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SCHEMA}")
    library.impl("nms", plain_nms, "CPU")
    _DECLARED.append(library)
    return True


def allow_plain_nms() -> None:
    """Lets `torchvision.ops.nms` call the plain implementation, where that is the one there is.

    torchvision's function refuses to run without its compiled library, whoever implements the
    operator. Its others, such as `roi_pool`, keep refusing. Call this before a detector runs.
    """
    if declare_missing_operators():
        from torchvision.ops import boxes

        boxes._assert_has_ops = lambda: None


def plain_nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: a box goes when a better one that stays covers it.

    Args:
        dets: (N, 4) boxes, left, top, right, bottom.
        scores: (N,).
        iou_threshold: boxes with a larger intersection over union are the same object.

    Returns:
        (M,) int64, which boxes stay, the best first; of equal scores the first.
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
