"""The survey of a set of posed frames: depth of every frame that is matched, and its unit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.labelled.depth_units import METRES
from data.labelled.posed import FrameFiles, PosedLayout
from data.labelled.survey import Finding, Survey, listed
from data.progress import track
from data.read_ahead import read_ahead

_FAR = 50.0  # distance between two cameras, as a multiple of the median depth


class PosedSurvey(Survey):
    """Counts the pixels with depth of each frame.

    Args:
        dataset: posed frames.
        pairs: those that are matched.
        stride: pixels between the points that are matched.
    """

    noun = "depths"

    def __init__(
        self, dataset: PosedLayout, pairs: Sequence[tuple[FrameFiles, FrameFiles]], stride: int
    ) -> None:
        self.root, self.tree = dataset.root, dataset.tree
        self.options = f"{dataset.model_dump_json()} {stride}"
        self._dataset, self._pairs, self._stride = dataset, pairs, stride
        self._frames = list({each.image: each for pair in pairs for each in pair}.values())

    def files(self) -> list[Path]:
        """See `Survey.files`; without the poses, which `parsed` has."""
        return [path for each in self._frames for path in (each.image, each.depth)]

    def parsed(self) -> str:
        """Poses, focal lengths and pairs."""
        facts = [
            (f.image.name, f.pose.tolist(), np.array(f.focal_px).tolist()) for f in self._frames
        ]
        return repr((facts, [(a.image.name, b.image.name) for a, b in self._pairs]))

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        known, medians = {}, []
        read = read_ahead(lambda files: self._dataset.load(files).depth, self._frames, ahead=8)
        start = self._stride // 2
        for files in track(self._frames, "looking at the depth of the frames"):
            depth = next(read)[start :: self._stride, start :: self._stride]
            known[str(files.depth)] = int((depth > 0).sum())
            medians += [float(np.median(depth[depth > 0]))] if (depth > 0).any() else []
        apart = [float(np.linalg.norm(a.pose[:3, 3] - b.pose[:3, 3])) for a, b in self._pairs]
        return {
            "frames": len(self._frames),
            "pairs": len(self._pairs),
            "without_depth": [path for path, count in known.items() if count < 2],
            "median_depth": float(np.median(medians)) if medians else None,
            "median_distance": float(np.median(apart)) if apart else None,
            "not_rotations": sum(not _is_motion(f.pose) for f in self._frames),
        }

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        empty, frames = counts["without_depth"], counts["frames"]
        if empty:
            text = f"{len(empty)} of {frames} frames have no depth at two points or more"
            return [Finding(f"{text}: {listed(empty)}", fatal=True, final=True)]
        findings, depth, distance = [], counts["median_depth"], counts["median_distance"]
        if not METRES[0] <= depth <= METRES[1]:
            text = f"the median depth is {depth:.3g} m: are the depth maps in another unit?"
            findings.append(Finding(text, fatal=True))
        elif distance > _FAR * depth:
            text = (
                f"cameras are {distance:.3g} m apart (median) and see things at {depth:.3g} m: are "
                "the poses in millimetres, or in another unit than the depth?"
            )
            findings.append(Finding(text, fatal=True))
        if counts["not_rotations"]:
            text = f"{counts['not_rotations']} of {frames} poses are no rotation and translation"
            findings.append(Finding(f"{text}: are they camera to world, 4 x 4?", fatal=True))
        return findings


def _is_motion(pose: np.ndarray) -> bool:
    """Whether a matrix (4, 4) is a rotation and a translation, of columns, and not mirrored."""
    turn = pose[:3, :3]
    rigid = np.allclose(turn @ turn.T, np.eye(3), atol=0.05) and np.linalg.det(turn) > 0
    return bool(rigid and np.allclose(pose[3], (0, 0, 0, 1), atol=1e-3))
