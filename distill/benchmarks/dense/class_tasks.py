"""Tasks whose labels are classes: semantic segmentation, parts of people, saliency."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.labelled.files import IGNORED
from distill.benchmarks.dense.counters import ClassCounter, Counter, SaliencyCounter
from distill.benchmarks.dense.label_pictures import label_colours
from distill.benchmarks.dense.pixel_task import PixelTask


class ClassTask(PixelTask):
    """One class for each pixel: cross entropy, and mIoU; `outputs` is the number of classes."""

    headline = "miou"

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """Cross entropy; see `PixelTask.loss`."""
        return cross_entropy(predicted, truth[:, 0])

    def decode(self, predicted: Tensor) -> Tensor:
        """The likeliest class."""
        return predicted.argmax(-3, keepdim=True).float()

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """One confusion matrix."""
        return ClassCounter(self.outputs, device)

    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """A colour for each class."""
        return label_colours(self.outputs)[maps[0].long()].permute(2, 0, 1) / 255


class SaliencyTask(PixelTask):
    """Saliency: balanced binary cross entropy, and the largest F measure."""

    headline = "max_f"

    def loss(self, predicted: Tensor, truth: Tensor, step: int) -> Tensor:
        """Binary cross entropy in which each class is weighted by the share of the other."""
        known = truth != IGNORED
        logits, labels = predicted[known], truth[known]
        if not len(labels):
            return predicted.sum() * 0
        others = 1 - labels.mean()
        weights = torch.where(labels == 1, others, 1 - others)
        return F.binary_cross_entropy_with_logits(logits, labels, weights)

    def decode(self, predicted: Tensor) -> Tensor:
        """A probability."""
        return predicted.sigmoid()

    def counter(self, num_images: int, device: torch.device) -> Counter:
        """Counts at every threshold."""
        return SaliencyCounter(device)

    def colours(self, maps: Tensor, truth: Tensor) -> Tensor:
        """Grey."""
        return (maps * (maps != IGNORED)).expand(3, -1, -1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over labelled pixels, 0 where there is none.

    Args:
        logits: (B, K, H, W).
        labels: classes (B, H, W), 255 where ignored.
    """
    wanted = labels.long()
    total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / (wanted != IGNORED).sum().clamp(min=1)
