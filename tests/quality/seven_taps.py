"""JBU with the gradient of the public CUDA kernel, which reaches 7 of its 49 taps.

The backward pass of the public adaptive convolution writes dK for the taps 0, 1, 4, 9, 16, 25 and
36 only. The forward pass is that of `featup`, so trained weights differ only by the missing
gradients.
"""

import torch
from torch import Tensor

from teachers.features import FeatureSpec
from teachers.upsamplers.featup import FeatUp
from teachers.upsamplers.jbu import JBULevel

TAPS = (0, 1, 4, 9, 16, 25, 36)


class SevenTapsLevel(JBULevel):
    """A level whose kernel has a gradient at those taps only."""

    def kernels(self, guidance: Tensor) -> Tensor:
        kernels = super().kernels(guidance)
        if kernels.requires_grad:
            reached = torch.zeros(kernels.shape[-2:].numel()).to(kernels)
            reached[list(TAPS)] = 1
            kernels.register_hook(lambda gradient: gradient * reached.view(kernels.shape[-2:]))
        return kernels


class SevenTaps(FeatUp):
    """FeatUp with such levels."""

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int], sigma: float) -> None:
        super().__init__(spec, factor, sigma)
        for level in self.jbu.levels:
            level.__class__ = SevenTapsLevel  # the same weights, initialised alike
