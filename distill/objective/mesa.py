"""MESA: a loss between the student and the moving average of its weights, on another crop.

Du et al., "Sharpness-Aware Training for Free" (arXiv 2205.14083), applied to backbone maps with
displaced crops as in C-RADIOv4 (arXiv 2601.17237): the mean of (LN(x)[u + d] - LN(x')[u])^2, where
LN is a layer norm without weights, x the student's map, x' the average's and d the displacement.
The average runs in evaluation mode, as it is exported.
"""

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from distill.objective.views import Align
from teachers.config import StrictConfig

EMA = "moving average"  # its name among the consumers of views; no teacher's has a space


class MesaConfig(StrictConfig):
    """The weight of the loss; neither number is published.

    Attributes:
        weight: of the loss.
        start_step: the first optimiser step, from 0, with the loss.
    """

    weight: PositiveFloat = 1.0
    start_step: NonNegativeInt = 0


def mesa_loss(student: Tensor, average: Tensor, align: Align) -> Tensor:
    """The mean squared difference of two normalised backbone maps, ().

    Args:
        student: (B, C, h, w) float32.
        average: (B, C, h, w) float32, of the averaged weights; without a graph.
        align: pairs the cells that show the same place, `Views.pairs`.
    """
    normalised = (
        F.layer_norm(maps.movedim(1, -1), maps.shape[1:2]).movedim(-1, 1)
        for maps in (student, average)
    )
    pairs = align(EMA, *normalised)
    return torch.stack([F.mse_loss(x, y) if y.numel() else x.sum() for x, y in pairs]).mean()
