"""Pixel normalisations: the common ones, and a warning for images that are not in [0, 1]."""

from weakref import WeakSet

import torch
from torch import Tensor, nn

from teachers.messages import say_once

# Per-channel mean and standard deviation, for images in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI_MEAN, OPENAI_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)

_LOW, _HIGH = -0.5, 1.5  # resizing overshoots by less
_seen: WeakSet[nn.Module] = WeakSet()


def warn_of_range(images: Tensor, model: nn.Module) -> None:
    """Says once if the images that a model is given are far outside [0, 1].

    Reading values holds up an accelerator, so there only the first images are looked at. Nothing is
    read in a compiled or exported program, on the meta device, or of fake tensors.
    """
    if torch.compiler.is_compiling() or images.is_meta or type(images) is not Tensor:
        return
    if not images.numel() or (images.device.type != "cpu" and model in _seen):
        return
    _seen.add(model)
    low, high = (float(each) for each in images.detach().aminmax())
    if low >= _LOW and high <= _HIGH:
        return
    name = type(model).__name__
    cure = "divide 0..255 by 255" if high > 10 else "are they normalised already? It does so itself"
    say_once(f"{name}: images from {low:.4g} to {high:.4g}, expected [0, 1]; {cure}", name)
