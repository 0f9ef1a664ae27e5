"""Pairs of images with common keypoints: SPair-71k, PF-WILLOW, and your own folders.

Points are (x, y) in pixels, as in the files; (0, 0) is the outer corner of an image's first pixel.
"""

from collections.abc import Collection
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from data.errors import DataError, did_you_mean
from data.image_files import IMAGES, is_hidden, is_image, warn_once
from data.labelled.files import read_csv, read_json
from data.labelled.layout import Layout
from data.text import shown


class KeypointPair(NamedTuple):
    """Two images and the keypoints that are visible in both.

    Attributes:
        source: the image with the query keypoints.
        target: the image that is searched.
        source_points: (N, 2) as x, y in pixels.
        target_points: (N, 2) in the same order.
        extent_px: the longer side of the target's box, which errors are divided by.
        category: of the object.
        viewpoint: difference of the viewpoints, 0 to 2; None if the set does not have it.
    """

    source: Path
    target: Path
    source_points: np.ndarray
    target_points: np.ndarray
    extent_px: float
    category: str
    viewpoint: int | None = None


class SPair(Layout):
    """SPair-71k (arXiv 1908.10543), pairs of `split`; errors are relative to the object's box."""

    tree: ClassVar[str] = (
        "  JPEGImages/<category>/*.jpg\n"
        "  PairAnnotation/{trn,val,test}/*.json   src_imname, trg_imname, src_kps, trg_kps,\n"
        "                                         trg_bndbox, category, viewpoint_variation"
    )

    kind: Literal["spair"]
    split: Literal["trn", "val", "test"] = "test"

    def pairs(self) -> list[KeypointPair]:
        """All pairs of the split, in the order of their files' names.

        Raises:
            DataError: files are missing, or an annotation is incomplete.
        """
        return [self._pair(path) for path in self.glob("*.json", "PairAnnotation", self.split)]

    def _pair(self, path: Path) -> KeypointPair:
        facts = _load_json(path)
        try:
            left, top, right, bottom = facts["trg_bndbox"]
            category = facts["category"]
            return KeypointPair(
                self.path("JPEGImages", category, facts["src_imname"]),
                self.path("JPEGImages", category, facts["trg_imname"]),
                _points(facts["src_kps"]),
                _points(facts["trg_kps"]),
                float(max(right - left, bottom - top)),
                category,
                int(facts["viewpoint_variation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the pair '{path}': {type(error).__name__}: {error}") from error


class PFWillow(Layout):
    """PF-WILLOW (arXiv 1511.05065), with the list of pairs that matching papers use.

    Errors are relative to the box around the target's ten keypoints.
    """

    tree: ClassVar[str] = (
        "  test_pairs.csv   a header, then a line for each pair: both images, ten x and ten y of\n"
        "                   the source's points, ten x and ten y of the target's\n"
        "  <the images at the paths of the list, such as PF-dataset/car(G)/*.png>"
    )

    kind: Literal["pf_willow"]

    def pairs(self) -> list[KeypointPair]:
        """All pairs of the list, in its order; the category is an image's folder.

        Raises:
            DataError: the list or an image is missing, or a line is no pair.
        """
        path = self.path("test_pairs.csv")
        lines = read_csv(path)[1:]
        return [self._pair(line, f"{path}, line {i}") for i, line in enumerate(lines, 2)]

    def _pair(self, line: list[str], where: str) -> KeypointPair:
        if len(line) != 42:
            raise DataError(
                f"{where}: expected 42 columns, two images and 40 numbers, got {len(line)}"
            )
        source, target = (self.path(name) for name in line[:2])
        try:
            numbers = np.array(line[2:], dtype=np.float64).reshape(2, 2, 10)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        first, second = numbers.transpose(0, 2, 1)
        return KeypointPair(source, target, first, second, _extent(second), source.parent.name)


class KeypointFolders(Layout):
    """One folder for each category; every image is matched with every other of its folder.

    Errors are relative to the box around the target's keypoints.
    """

    tree: ClassVar[str] = (
        "  <category>/*.jpg (or png, webp)\n"
        "  <category>/keypoints.json   {image's name without extension: [[x, y], ...]}, the same\n"
        "                              points in the same order, null for invisible ones"
    )

    kind: Literal["keypoints"]

    def pairs(self) -> list[KeypointPair]:
        """All ordered pairs of all categories.

        Raises:
            DataError: files are missing, or images of a category have different numbers of points.
        """
        pairs = []
        annotated = self.glob("*/keypoints.json")
        self._report_unread(annotated)
        for path in annotated:
            points = _named_points(path)
            files = self._files(path, points)
            for source, target in permutations(sorted(points), 2):
                visible = np.isfinite(points[target]).all(1)
                both = visible & np.isfinite(points[source]).all(1)
                pairs.append(
                    KeypointPair(
                        files[source],
                        files[target],
                        points[source][both],
                        points[target][both],
                        _extent(points[target][visible]),
                        path.parent.name,
                    )
                )
        return pairs

    def _files(self, path: Path, names: Collection[str]) -> dict[str, Path]:
        """The images with keypoints; warns of those without."""
        images = self.images_in(str(path.parent.relative_to(self.root)))
        for name in names:
            if name not in images:
                bare = name.rpartition(".")[0]
                hint = f" (did you mean {bare!r}?)" if bare in images else ""
                raise DataError(
                    f"{path} has {shown(name)!r}, but there is no such image in its folder "
                    f"({IMAGES}){hint or did_you_mean(name, images)}"
                )
        unused = [image.name for name, image in images.items() if name not in names]
        if unused:
            warn_once(path, f"{len(unused)} images have no keypoints, such as {shown(unused[0])}")
        return images

    def _report_unread(self, annotated: Collection[Path]) -> None:
        """Warns of folders with images that have no keypoints at all."""
        read = {path.parent for path in annotated}
        others = sorted(
            each.name
            for each in self.root.iterdir()
            if each.is_dir()
            and each not in read
            and not is_hidden(each.name)
            and any(is_image(path.name) for path in each.iterdir())
        )
        if others:
            warn_once(
                self.root,
                f"left out {len(others)} folders of images without keypoints.json, such as "
                f"{shown(others[0])}",
            )


AnyKeypoints = Annotated[SPair | PFWillow | KeypointFolders, Field(discriminator="kind")]


def _load_json(path: Path) -> dict[str, Any]:
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise DataError(f"the annotation '{path}': expected a mapping")
    return facts


def _named_points(path: Path) -> dict[str, np.ndarray]:
    """The points of each image of a `keypoints.json`."""
    points = {}
    for name, found in _load_json(path).items():
        try:
            points[name] = _points(found)
        except (TypeError, ValueError) as error:
            three = isinstance(found, list) and any(isinstance(p, list) and p[2:] for p in found)
            hint = "; a third number, of visibility, has no place: null is invisible"
            raise DataError(
                f"{path}: {shown(name)!r}: expected [[x, y] or null, ...]{hint if three else ''}, "
                f"got {shown(str(found), 60)}"
            ) from error
    numbers = {len(found): name for name, found in points.items()}
    if len(numbers) > 1:
        (one, first), (other, second) = list(numbers.items())[:2]
        raise DataError(
            f"{path}: images have different numbers of points: {shown(first)!r} {one}, "
            f"{shown(second)!r} {other}; invisible ones are null"
        )
    return points


def _points(found: list[list[float] | None]) -> np.ndarray:
    rows = [(np.nan, np.nan) if point is None else point for point in found]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2)


def _extent(points: np.ndarray) -> float:
    return float(np.ptp(points, axis=0).max()) if len(points) else 0.0
