"""The survey of a multi-task set: what is known of each task, in both splits."""

from pathlib import Path
from typing import Any

import numpy as np

from data.labelled.class_counts import judge_classes
from data.labelled.depth_units import METRES
from data.labelled.files import IGNORED
from data.labelled.multitask import MultiTaskSample, NyudLayout, PascalContextLayout
from data.labelled.survey import (
    SPLITS,
    Finding,
    Fits,
    Size,
    Survey,
    any_sizes,
    samples_of,
    sizes_of,
)
from data.progress import track
from data.read_ahead import read_ahead


class MultiTaskSurvey(Survey):
    """Counts the known pixels of each task.

    Args:
        dataset: the set.
        fits: judges the sizes of the images.
    """

    def __init__(self, dataset: PascalContextLayout | NyudLayout, fits: Fits = any_sizes) -> None:
        self._dataset, self._fits = dataset, fits
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._samples = samples_of(dataset)

    def files(self) -> list[Path]:
        """See `Survey.files`."""
        names = dict.fromkeys(name for samples in self._samples.values() for name in samples)
        return list(dict.fromkeys(path for name in names for path in self._dataset.files(name)))

    def parsed(self) -> str:
        """The lists."""
        return repr(self._samples)

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        return {split: self._count(split) for split in SPLITS}

    def _count(self, split: str) -> dict[str, Any]:
        samples = self._samples[split]
        total: dict[str, np.ndarray] = {}
        medians, sizes = [], set[Size]()
        read = read_ahead(lambda name: _numbers(self._dataset.read(name)), samples)
        for _ in track(samples, f"counting the labels of {split}"):
            counts, median, size = next(read)
            sizes.add(size)
            for task, numbers in counts.items():
                total[task] = total.get(task, 0) + numbers
            medians += [] if median is None else [median]
        found: dict[str, Any] = {task: numbers.tolist() for task, numbers in total.items()}
        found |= {"images": len(samples), "sizes": sorted(sizes)}
        found["median_depth"] = float(np.median(medians)) if medians else None
        return found

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        findings = []
        for task, num in self._dataset.num_classes.items():
            by_split = {split: counts[split][task][:num] for split in SPLITS}
            names = [str(number) for number in range(num)]
            findings += [(task, f) for f in judge_classes(names, by_split, "pixel")]
        for task in ("saliency", "normals", "depth"):
            if task in self._dataset.tasks:
                findings += [(task, f) for f in _judge_known(task, counts)]
        named = [finding._replace(text=f"{task}: {finding.text}") for task, finding in findings]
        return named + self._fits(sizes_of(counts))


def _numbers(sample: MultiTaskSample) -> tuple[dict[str, np.ndarray], float | None, Size]:
    """Pixels of each class, or unknown and known, by task.

    Also the median of the known depths, and the size.
    """
    found = {"semseg": np.bincount(sample.semseg.ravel(), minlength=IGNORED + 1)}
    if sample.parts is not None:
        found["parts"] = np.bincount(sample.parts.ravel(), minlength=IGNORED + 1)
    if sample.saliency is not None:
        found["saliency"] = np.bincount(sample.saliency.ravel(), minlength=2)[:2]
    known = (sample.normals != 0).any(2).sum()
    found["normals"] = np.array([sample.semseg.size - known, known])
    median = None
    if sample.depth is not None:
        depth = sample.depth[sample.depth > 0]
        found["depth"] = np.array([sample.depth.size - len(depth), len(depth)])
        median = float(np.median(depth)) if len(depth) else None
    height, width = sample.semseg.shape
    return found, median, (height, width)


def _judge_known(task: str, counts: dict[str, Any]) -> list[Finding]:
    findings = []
    what = {"saliency": "salient", "normals": "with a normal", "depth": "with a depth"}[task]
    for split, each in counts.items():
        unknown, known = each[task]
        if not known:
            findings.append(Finding(f"{split} has no pixel {what}", fatal=True, final=True))
        elif task == "saliency" and not unknown:
            findings.append(Finding(f"every pixel of {split} is salient", fatal=True))
        median = each["median_depth"]
        if task == "depth" and known and not METRES[0] <= median <= METRES[1]:
            text = f"the median depth of {split} is {median:.3g} m; expected metres"
            cause = ": are the files in millimetres?" if median > METRES[1] else ""
            findings.append(Finding(text + cause, fatal=True))
    return findings
