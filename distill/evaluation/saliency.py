"""Saliency: the largest F measure over thresholds, of all pixels of a set together."""

import torch
from torch import Tensor
from torchmetrics.classification import BinaryPrecisionRecallCurve

from data.labelled.files import IGNORED

THRESHOLDS = 255


class MaxF:
    """The largest F1 over 255 thresholds between 0 and 1, pooled over pixels, not over images.

    torchmetrics counts, and adds up over ranks when `compute` is called, which all ranks have to
    do. It takes values outside [0, 1] for logits by itself; here they are refused, because a batch
    of logits that happen to lie in [0, 1] would be taken for probabilities.

    Args:
        device: where the counts are kept.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        curve = BinaryPrecisionRecallCurve(thresholds=THRESHOLDS, ignore_index=IGNORED)
        self._curve = curve.to(device) if device is not None else curve

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Adds pixels.

        Args:
            probabilities: float in [0, 1], of any shape.
            labels: integers of the same shape: 1 salient, 0 not, 255 ignored.

        Raises:
            ValueError: a probability is not in [0, 1].
        """
        low, high = probabilities.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"saliency from {float(low):g} to {float(high):g}: probabilities in [0, 1] are due"
            )
        self._curve.update(probabilities, labels.long())

    def compute(self) -> float:
        """The largest F1 in per cent; 0 where no pixel is salient."""
        # torchmetrics has NaN for the precision where nothing is predicted: no hit, F is 0.
        precision, recall = (c.double().nan_to_num(0) for c in self._curve.compute()[:2])
        scores = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return 100 * float(scores.max())
