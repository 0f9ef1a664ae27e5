"""Segmentation sets as files: how numbers and colours become classes, and folders of one's own.

Label maps leave here with classes 0 .. K-1 and 255 for what neither trains nor counts, once and
for all: nothing after this shifts a label.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, model_validator

from data.errors import DataError
from data.labelled.files import IGNORED, read_indices, read_rgb
from data.labelled.layout import Layout, Split
from data.labelled.segmentation_set import PixelSample, SegmentationSet

Colour = tuple[int, int, int]


class SegmentationLayout(Layout, SegmentationSet):
    """A set of labelled pixels in files below one folder."""

    def read(self, sample: PixelSample) -> tuple[np.ndarray, np.ndarray]:
        """Reads an image and its labels; see `SegmentationSet.read`."""
        image, labels = read_rgb(sample.image), self._labels(sample.target)
        if image.shape[:2] != labels.shape:
            raise DataError(
                f"'{sample.target}' is {labels.shape[0]} x {labels.shape[1]}, its image "
                f"{image.shape[0]} x {image.shape[1]}"
            )
        return image, labels

    def _labels(self, path: Path) -> np.ndarray:
        return renumbered(read_indices(path), self._table(), path)

    def _table(self) -> Mapping[int, int]:
        """Number in the file to class; 255 for those that are ignored."""
        return {number: number for number in (*range(len(self.names)), IGNORED)}


class FolderSegmentation(SegmentationLayout):
    """Any folders of images and label maps of the same names, in the form of ADE20K.

    Attributes:
        classes: their names, in the order of their numbers.
        first: the number of the first class in the files.
        ignored: numbers in the files that neither train nor count, beside 255.
        colours: where label maps are coloured, the colour of each class; every other is ignored.
        train: folders of images and of label maps to train on, below the root.
        test: the same to measure on.
    """

    tree: ClassVar[str] = (
        "  images/training/*.jpg        annotations/training/*.png\n"
        "  images/validation/*.jpg      annotations/validation/*.png\n"
        "(or what `train` and `test` name)"
    )

    kind: Literal["folder"]
    classes: Annotated[tuple[str, ...], Field(min_length=2, max_length=IGNORED)]
    first: NonNegativeInt = 0
    ignored: tuple[NonNegativeInt, ...] = ()
    colours: tuple[Colour, ...] | None = None
    train: tuple[str, str] = ("images/training", "annotations/training")
    test: tuple[str, str] = ("images/validation", "annotations/validation")

    @model_validator(mode="after")
    def _a_colour_a_class(self) -> Self:
        if self.colours is not None and len(self.colours) != len(self.classes):
            raise ValueError(
                f"colours: {len(self.colours)} colours for {len(self.classes)} classes"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """As the recipe has them."""
        return self.classes

    def samples(self, split: Split) -> list[PixelSample]:
        """All images of the split's folder."""
        images, labels = self.train if split == "train" else self.test
        return pairs(self, images, labels)

    def _labels(self, path: Path) -> np.ndarray:
        if self.colours is not None:
            return from_colours(path, self.colours)
        return super()._labels(path)

    def _table(self) -> Mapping[int, int]:
        ignored = dict.fromkeys((*self.ignored, IGNORED), IGNORED)
        return ignored | {self.first + i: i for i in range(len(self.classes))}


def renumbered(values: np.ndarray, table: Mapping[int, int], path: Path) -> np.ndarray:
    """Numbers in a file to classes.

    Args:
        values: (H, W) as in the file.
        table: number in the file to class.
        path: of the file, for the message.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: a number is in no row of the table.
    """
    present = np.unique(values)
    unknown = [int(number) for number in present if int(number) not in table]
    if unknown:
        raise DataError(
            f"the label map '{path}' has the number {unknown[0]}, which is no class and not "
            f"ignored; known are {min(table)} to {max(n for n in table if n != IGNORED)} and 255"
        )
    lookup = np.zeros(int(present.max()) + 1, np.uint8)
    lookup[present] = [table[int(number)] for number in present]
    return lookup[values]


def from_colours(path: Path, colours: Sequence[Colour]) -> np.ndarray:
    """Classes of a coloured label map, uint8 (H, W); 255 where a colour is none of them."""
    pixels = read_rgb(path).astype(np.int64)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    labels = np.full(codes.shape, IGNORED, np.uint8)
    for number, (red, green, blue) in enumerate(colours):
        labels[codes == (red << 16 | green << 8 | blue)] = number
    return labels


def pairs(layout: Layout, images: str, labels: str) -> list[PixelSample]:
    """Every image of a folder, with the label map of the same name in another."""
    found = [*layout.place(images).glob("*.jpg"), *layout.place(images).glob("*.png")]
    if not found:
        layout.found("*.jpg", images)  # whose message has the tree
    targets = layout.place(labels)
    return [PixelSample(i, targets / f"{i.stem}.png", i.stem) for i in sorted(found)]
