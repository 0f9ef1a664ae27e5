"""The survey of a segmentation set: pixels of each class, in both splits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from data.labelled.class_counts import MOST_IGNORED, judge_classes, judge_ignored
from data.labelled.files import IGNORED
from data.labelled.label_coding import judge_colours, judge_numbers, stored_coding
from data.labelled.segmentation_files import PixelSample, SegmentationLayout
from data.labelled.survey import (
    SPLITS,
    Finding,
    Fits,
    Size,
    Survey,
    any_sizes,
    below,
    same_images,
    samples_of,
    sizes_of,
)
from data.progress import track
from data.read_ahead import read_ahead


class LabelSurvey(Survey):
    """Counts the pixels of each class.

    Args:
        dataset: in files.
        fits: judges the sizes of the images.
    """

    noun = "label maps"

    def __init__(self, dataset: SegmentationLayout, fits: Fits = any_sizes) -> None:
        self._dataset, self._fits = dataset, fits
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._samples = samples_of(dataset)

    def files(self) -> list[Any]:
        """See `Survey.files`."""
        every = [sample for samples in self._samples.values() for sample in samples]
        return list(dict.fromkeys(p for each in every for p in (each.image, each.target)))

    def parsed(self) -> str:
        """The images and label maps of each split, which lists may decide."""
        return repr(
            {
                split: [(below(self.root, s.image), below(self.root, s.target)) for s in samples]
                for split, samples in self._samples.items()
            }
        )

    def count(self) -> dict[str, Any]:
        """See `Survey.count`; also what is stored in the files, where classes are missing."""
        for samples in self._samples.values():
            self._dataset.read(samples[0])
        num = len(self._dataset.names)
        counts: dict[str, Any] = {s: self._count(s, num) for s in SPLITS}
        if any(_suspicious(each) for each in counts.values()):
            for split in SPLITS:
                counts[split]["stored"] = stored_coding(self._dataset, self._samples[split])
        return counts

    def _count(self, split: str, num_classes: int) -> dict[str, Any]:
        samples = self._samples[split]
        histograms = read_ahead(partial(_histogram, self._dataset), samples)
        total, unlabelled, sizes = np.zeros(IGNORED + 1, np.int64), 0, set[Size]()
        for _ in track(samples, f"counting the labels of {split}"):
            histogram, size = next(histograms)
            sizes.add(size)
            total += histogram
            unlabelled += not histogram[:IGNORED].any()
        return {
            "images": len(samples),
            "images_without_label": unlabelled,
            "pixels": int(total.sum()),
            "ignored": int(total[IGNORED]),
            "classes": total[:num_classes].tolist(),
            "sizes": sorted(sizes),
        }

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        by_class = {split: counts[split]["classes"] for split in SPLITS}
        ignored = {split: counts[split]["ignored"] for split in SPLITS}
        total = {split: counts[split]["pixels"] for split in SPLITS}
        hint, found = "", list[Finding]()
        if all("stored" in counts[split] for split in SPLITS):
            stored = {split: counts[split]["stored"] for split in SPLITS}
            if self._dataset.class_colours is None:
                missing = [
                    i for i, n in enumerate(zip(*by_class.values(), strict=True)) if not any(n)
                ]
                hint, found = judge_numbers(self._dataset, stored, missing)
            else:
                shares = {split: ignored[split] / max(1, total[split]) for split in SPLITS}
                hint, found = judge_colours(stored, shares)
        found += judge_classes(self._dataset.names, by_class, "pixel", hint)
        found += judge_ignored(ignored, total) + self._fits(sizes_of(counts))
        return found + same_images({s: [x.image for x in self._samples[s]] for s in SPLITS})


def _histogram(dataset: SegmentationLayout, sample: PixelSample) -> tuple[np.ndarray, Size]:
    labels = dataset.labels(sample)
    height, width = labels.shape
    return np.bincount(labels.ravel(), minlength=IGNORED + 1), (height, width)


def _suspicious(counts: dict[str, Any]) -> bool:
    numbers: Sequence[int] = counts["classes"]
    return min(numbers) == 0 or counts["ignored"] > MOST_IGNORED * counts["pixels"]
