"""Segmentation metrics from the confusion matrix of a whole test set.

A class that neither occurs nor is predicted has no IoU and is left out of the mean, as in
mmsegmentation, DINOv3 and torchmetrics' macro average.
"""

from torch import Tensor

from data.labelled.files import IGNORED


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts the pixels of each pair of classes.

    Args:
        predicted: classes, (H, W).
        labels: classes, (H, W); 255 is ignored.
        num_classes: K.

    Returns:
        int64 (K, K): rows are labels, columns predictions.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(
        predicted, labels.long(), num_classes, ignore_index=IGNORED, validate_args=False
    )


def class_ious(matrix: Tensor) -> list[float | None]:
    """The IoU of each class in per cent; None where the union is empty."""
    hits, rows, columns = matrix.diag(), matrix.sum(1), matrix.sum(0)
    unions = rows + columns - hits
    return [
        100 * int(hit) / int(union) if union else None
        for hit, union in zip(hits, unions, strict=True)
    ]


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """mIoU, pixel accuracy and the mean of the classes' accuracies, in per cent.

    `miou` leaves out classes that neither occur nor are predicted; `miou_absent_as_0` counts them
    as 0, as multi-task papers do.

    Args:
        matrix: int64 (K, K), see `confusion_matrix`.

    Raises:
        RuntimeError: no pixel was counted.
    """
    total = int(matrix.sum())
    if not total:
        raise RuntimeError("the confusion matrix counts no labelled pixel")
    ious = class_ious(matrix)
    present = [iou for iou in ious if iou is not None]
    rows = matrix.sum(1)
    recalls = matrix.diag()[rows > 0].double() / rows[rows > 0].double()
    return {
        "miou": sum(present) / len(present),
        "pixel_accuracy": 100 * int(matrix.diag().sum()) / total,
        "mean_accuracy": 100 * float(recalls.mean()),
        "miou_absent_as_0": sum(iou or 0.0 for iou in ious) / len(ious),
    }
