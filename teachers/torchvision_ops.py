"""Lets a CPU build of torch live beside a CUDA build of torchvision.

timm and open_clip import torchvision. Where its compiled operators cannot be loaded, torchvision's
own Python code fails at import with `operator torchvision::nms does not exist`. We then declare
the two schemas that its import looks up; nobody here calls them.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch

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
    _DECLARED.append(library)
    return True
