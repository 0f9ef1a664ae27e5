"""The survey of a depth set: known depths and their range, and known normals, in both splits."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.labelled.depth import DepthLayout, DepthSample
from data.labelled.depth_units import judge_depth
from data.labelled.survey import (
    SPLITS,
    Finding,
    Fits,
    Size,
    Survey,
    any_sizes,
    below,
    per_cent,
    same_images,
    samples_of,
    sizes_of,
)
from data.progress import track
from data.read_ahead import read_ahead

_VALUES = 256  # depths of an image from which quantiles are taken, evenly spaced
_QUANTILES = (0.01, 0.5, 0.99)
LEAST_KNOWN = 0.05  # share of known normals below which a warning says so


class DepthSurvey(Survey):
    """Counts known depths, and normals where they are read from files.

    Args:
        dataset: images with depth.
        depth_range: in metres, outside of which depth does not count; None for normals, whose
            depth may have any unit.
        fits: judges the sizes of the images.
    """

    noun = "depths"

    def __init__(
        self,
        dataset: DepthLayout,
        depth_range: tuple[float, float] | None,
        fits: Fits = any_sizes,
    ) -> None:
        self._dataset, self._range, self._fits = dataset, depth_range, fits
        self.root, self.tree = dataset.root, dataset.tree
        self.options = f"{dataset.model_dump_json()} {depth_range}"
        self._samples = samples_of(dataset)

    def files(self) -> list[Path]:
        """See `Survey.files`."""
        every = [sample for samples in self._samples.values() for sample in samples]
        files = [p for each in every for p in (each.image, each.depth, each.normals) if p]
        return list(dict.fromkeys(files))

    def parsed(self) -> str:
        """The files of each split and the focal lengths, which lists may decide."""
        return repr(
            {
                split: [
                    (*(below(self.root, p) for p in (s.image, s.depth, s.normals)), s.focal_px)
                    for s in samples
                ]
                for split, samples in self._samples.items()
            }
        )

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        for samples in self._samples.values():
            self._dataset.read(samples[0])
        return {split: self._count(split) for split in SPLITS}

    def _count(self, split: str) -> dict[str, Any]:
        samples = self._samples[split]
        rows, values, sizes = [], [np.zeros(0, np.float32)], set[Size]()
        read = read_ahead(self._numbers, samples)
        for _ in track(samples, f"looking at the depth of {split}"):
            row, some, size = next(read)
            rows.append(row)
            sizes.add(size)
            values.append(some)
        pixels, known, below, above, normals = np.array(rows).sum(0).tolist()
        some = np.concatenate(values)
        return {
            "images": len(samples),
            "images_without_depth": sum(row[1] == 0 for row in rows),
            "pixels": pixels,
            "known": known,
            "inside": known - below - above,
            "below": below,
            "above": above,
            "normals": normals,
            "quantiles": np.quantile(some, _QUANTILES).tolist() if len(some) else None,
            "stored": _stored_type(samples[0].depth),
            "sizes": sorted(sizes),
        }

    def _numbers(self, sample: DepthSample) -> tuple[list[int], np.ndarray, Size]:
        """Numbers of pixels: all, known, nearer and farther than the range, with normals.

        Also some of the known depths, and the size.
        """
        view = self._dataset.read(sample)
        depth = view.depth[view.depth > 0]
        low, high = self._range or (0.0, np.inf)
        below, above = (depth < low).sum(), (depth > high).sum()
        normals = 0 if view.normals is None else (view.normals != 0).any(2).sum()
        row = [view.depth.size, len(depth), int(below), int(above), int(normals)]
        height, width = view.depth.shape
        return row, depth[:: max(1, len(depth) // _VALUES)][:_VALUES], (height, width)

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        shared = same_images({s: [x.image for x in self._samples[s]] for s in SPLITS})
        shared += self._fits(sizes_of(counts))
        if self._range is None:
            return self._judge_normals(counts) + shared
        unit = getattr(self._dataset, "unit", None)
        stated = "unit" in self._dataset.model_fields_set
        return judge_depth(counts, self._range, unit, stated) + shared

    def _judge_normals(self, counts: dict[str, Any]) -> list[Finding]:
        findings = []
        for split, each in counts.items():
            of_files = self._samples[split][0].normals is not None
            known, noun = (
                each["normals" if of_files else "known"],
                "normal" if of_files else "depth",
            )
            if not known:
                findings.append(
                    Finding(f"no pixel of {split} has a known {noun}", True, final=True)
                )
            elif known < LEAST_KNOWN * each["pixels"]:
                share = per_cent(known, each["pixels"])
                findings.append(Finding(f"only {share} of the pixels of {split} have a {noun}"))
        return findings


def _stored_type(path: Path) -> str:
    """The type of a depth file's numbers, as numpy names it."""
    if path.suffix == ".npy":
        return str(np.load(path, mmap_mode="r").dtype)
    with Image.open(path) as opened:
        return {"L": "uint8", "P": "uint8", "F": "float32"}.get(opened.mode, "uint16")
