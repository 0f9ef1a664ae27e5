"""The plain non-maximum suppression of CPU installs, against the definition."""

import pytest
import torch
from torch import Tensor

from teachers.torchvision_ops import allow_plain_nms, declare_missing_operators, plain_nms

repaired = pytest.mark.skipif(
    not declare_missing_operators(), reason="torchvision's compiled operators are here"
)


def some_boxes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes that overlap much; every fourth is empty, scores repeat."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 20, (count, 2), generator=generator).float()
    size = torch.randint(3, 15, (count, 2), generator=generator).float()
    size[::4, 0] = 0
    scores = torch.randint(0, 12, (count,), generator=generator) / 12
    return torch.cat([low, low + size], 1), scores


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - width * height
    return width * height / union if union else 0.0


def slow(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """By the definition, pair by pair."""
    listed, kept = boxes.tolist(), list[int]()
    for i in sorted(range(len(listed)), key=lambda i: -float(scores[i])):
        if all(overlap(listed[i], listed[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("count, seed", [(1, 0), (40, 1), (90, 2)])
def test_plain_nms_is_the_definition(count: int, seed: int, threshold: float) -> None:
    boxes, scores = some_boxes(count, seed)
    assert plain_nms(boxes, scores, threshold).tolist() == slow(boxes, scores, threshold)


def test_an_overlap_of_exactly_the_threshold_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 1], [1.0, 0, 2, 1]])  # half of the union is shared
    scores = torch.tensor([0.9, 0.8])
    assert plain_nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert plain_nms(boxes, scores, 0.49).tolist() == [0]


def test_no_box_gives_no_box() -> None:
    kept = plain_nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)


def test_torchvision_suppresses_within_classes_whichever_implementation_there_is() -> None:
    allow_plain_nms()
    from torchvision.ops import batched_nms

    boxes, scores = some_boxes(1500, 3)  # enough for its loop over classes
    scores = scores + torch.arange(1500) * 1e-5
    classes = torch.arange(1500) % 3
    due = [
        int(of_class[i])
        for of_class in (torch.where(classes == c)[0] for c in range(3))
        for i in plain_nms(boxes[of_class], scores[of_class], 0.5)
    ]
    kept = batched_nms(boxes, scores, classes, 0.5)
    assert sorted(kept.tolist()) == sorted(due)
    assert scores[kept].diff().max() < 0


@repaired
def test_operators_that_are_not_there_are_still_refused() -> None:
    allow_plain_nms()
    from torchvision.ops import roi_pool

    with pytest.raises(RuntimeError, match="Couldn't load custom C"):
        roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)
