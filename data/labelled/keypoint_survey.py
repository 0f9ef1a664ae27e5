"""The survey of a keypoint set: visible points of its pairs, and where they lie."""

from pathlib import Path
from typing import Any

import numpy as np

from data.labelled.files import read_rgb, read_size
from data.labelled.keypoints import KeypointFolders, KeypointPair, PFWillow, SPair
from data.labelled.survey import Finding, Survey, per_cent
from data.read_ahead import read_ahead

_EDGE = 1.0  # pixels by which points may lie outside of their image
_MANY = 0.2  # share of the points that is no accident


class KeypointSurvey(Survey):
    """Counts the points of all pairs.

    Args:
        dataset: pairs of images.
    """

    noun = "keypoints"

    def __init__(self, dataset: SPair | PFWillow | KeypointFolders) -> None:
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._pairs = dataset.pairs()

    def files(self) -> list[Path]:
        """See `Survey.files`; without the annotations, which `parsed` has."""
        return list(dict.fromkeys(p for pair in self._pairs for p in (pair.source, pair.target)))

    def parsed(self) -> str:
        """The points of all pairs."""
        return repr([_facts(pair) for pair in self._pairs])

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        files = self.files()
        for path in files[:1]:
            read_rgb(path)
        sizes = dict(zip(files, read_ahead(read_size, files), strict=True))
        points = outside = swapped = relative = no_extent = 0
        for pair in self._pairs:
            no_extent += bool(len(pair.target_points)) and not pair.extent_px > 0
            for path, at in ((pair.source, pair.source_points), (pair.target, pair.target_points)):
                sides = np.array(sizes[path][::-1])  # as x, y
                beyond = ((at < -_EDGE) | (at > sides + _EDGE)).any(1)
                turned = ((at >= -_EDGE) & (at <= sides[::-1] + _EDGE)).all(1)
                points, outside = points + len(at), outside + int(beyond.sum())
                swapped += int((beyond & turned).sum())
                relative += int((np.abs(at) <= 1).all(1).sum())
        return {
            "pairs": len(self._pairs),
            "pairs_without_point": sum(not len(pair.source_points) for pair in self._pairs),
            "pairs_without_extent": no_extent,
            "points": points,
            "outside": outside,
            "outside_but_not_as_y_x": swapped,
            "relative": relative,
            "categories": len({pair.category for pair in self._pairs}),
        }

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        points, findings = counts["points"], []
        expected = "expected x, y in pixels of the image"
        if not points:
            return [Finding("no keypoint is visible in two images", fatal=True, final=True)]
        if counts["relative"] == points:
            text = f"all {points} points lie in the first pixel"
            return [Finding(f"{text}: are they shares of the image's sides? {expected}", True)]
        if counts["outside"]:
            many = counts["outside"] > _MANY * points
            as_y_x = counts["outside_but_not_as_y_x"] > 0.9 * counts["outside"]
            text = f"{counts['outside']} of {points} points ({per_cent(counts['outside'], points)})"
            cause = ": are they y, x, or of images of another size?" if as_y_x and many else ";"
            findings.append(Finding(f"{text} lie outside of their image{cause} {expected}", many))
        if counts["pairs_without_extent"]:
            findings.append(
                Finding(
                    f"{counts['pairs_without_extent']} pairs have a target whose box has no extent "
                    "(a single visible point?): their matches always count as wrong"
                )
            )
        if counts["pairs_without_point"]:
            findings.append(
                Finding(
                    f"{counts['pairs_without_point']} of {counts['pairs']} pairs share no point"
                )
            )
        return findings


def _facts(pair: KeypointPair) -> list[Any]:
    names = [pair.source.name, pair.target.name, pair.category]
    points = [pair.source_points.tolist(), pair.target_points.tolist()]
    return [*names, *points, pair.extent_px, pair.viewpoint]
