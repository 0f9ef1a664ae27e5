"""Segmentation sets: the base class, classes from numbers and colours in files, your own folders.

Label maps have classes 0 .. K-1, and 255 for pixels that neither train nor count.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from data.errors import DataError
from data.labelled.files import IGNORED, read_rgb, read_size
from data.labelled.layout import Layout, Split
from data.labelled.pixel_values import read_colours, read_indices
from data.text import shown

_Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[_Level, _Level, _Level]


class PixelSample(NamedTuple):
    """The files of an image and of its label map; `key` is its name in messages."""

    image: Path
    target: Path
    key: str


class SegmentationSet(BaseModel):
    """A set of images with a class for every pixel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers."""

    @abstractmethod
    def samples(self, split: Split) -> list[PixelSample]:
        """The images of a split, in a fixed order.

        Raises:
            DataError: files are missing; the message shows the expected tree.
        """

    @abstractmethod
    def read(self, sample: PixelSample) -> tuple[np.ndarray, np.ndarray]:
        """Reads an image, uint8 (H, W, 3), RGB, and its labels, uint8 (H, W), 255 where ignored.

        Raises:
            DataError: a file cannot be read, the sizes differ, or a value is no class.
        """


class SegmentationLayout(Layout, SegmentationSet):
    """A segmentation set in files below one folder."""

    @property
    def class_colours(self) -> tuple[Colour, ...] | None:
        """The colour of each class in the label maps; None where they hold numbers."""
        return None

    @property
    def void_is_stated(self) -> bool:
        """Whether the layout or the recipe says that 255 is void; True for published sets."""
        return True

    def read(self, sample: PixelSample) -> tuple[np.ndarray, np.ndarray]:
        """Reads an image and its labels; see `SegmentationSet.read`."""
        image = read_rgb(self.existing(sample.image))
        return image, self._fitting(sample, (image.shape[0], image.shape[1]))

    def labels(self, sample: PixelSample) -> np.ndarray:
        """The labels of `read`, without decoding the image: only its header is read.

        Raises:
            DataError: see `SegmentationSet.read`.
        """
        return self._fitting(sample, read_size(self.existing(sample.image)))

    def _fitting(self, sample: PixelSample, size: tuple[int, int]) -> np.ndarray:
        """The labels of an image of (height, width) pixels."""
        labels = self._labels(self.existing(sample.target))
        if size != labels.shape:
            raise DataError(
                f"'{shown(sample.target)}' is {labels.shape[0]} x {labels.shape[1]}, its image "
                f"{size[0]} x {size[1]}"
            )
        return labels

    def _labels(self, path: Path) -> np.ndarray:
        return renumbered(read_indices(path), self._table(), path, self._cure)

    def _cure(self, present: Sequence[int]) -> str:
        """What to do about a file with these numbers, of which one is no class, for its message."""
        return ""

    def _table(self) -> Mapping[int, int]:
        """Maps numbers in the file to classes; to 255 if ignored."""
        return {number: number for number in (*range(len(self.names)), IGNORED)}


class FolderSegmentation(SegmentationLayout):
    """Folders of images and of label maps with the same names, as in ADE20K.

    Attributes:
        classes: their names, in the order of their numbers.
        first: the number of the first class in the files.
        ignored: numbers in the files that are ignored, besides 255.
        colours: for coloured label maps, the colour of each class; other colours are ignored.
        train: folders of training images and of their label maps, below the root.
        test: folders of test images and of their label maps.
    """

    tree: ClassVar[str] = (
        "  images/training/*.jpg        annotations/training/*.png\n"
        "  images/validation/*.jpg      annotations/validation/*.png\n"
        "(or the folders of `train` and `test`)"
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
        for key, values in (("classes", self.classes), ("colours", self.colours or ())):
            twice = [value for value, times in Counter(values).items() if times > 1]
            if twice:
                raise ValueError(f"{key}: {twice[0]!r} occurs twice")
        numbers = range(self.first, self.first + len(self.classes))
        both = [number for number in self.ignored if number in numbers and number != IGNORED]
        if both and self.colours is None:
            raise ValueError(
                f"ignored: {both[0]} is the number of {self.classes[both[0] - self.first]!r}"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the recipe."""
        return self.classes

    @property
    def class_colours(self) -> tuple[Colour, ...] | None:
        """See `SegmentationLayout`."""
        return self.colours

    @property
    def void_is_stated(self) -> bool:
        """See `SegmentationLayout`."""
        return IGNORED in self.ignored

    def samples(self, split: Split) -> list[PixelSample]:
        """All images of the split's folder."""
        images, labels = self.train if split == "train" else self.test
        return pairs(self, images, labels)

    def _labels(self, path: Path) -> np.ndarray:
        if self.colours is not None:
            return from_colours(path, self.colours)
        return super()._labels(path)

    def _cure(self, present: Sequence[int]) -> str:
        numbers = [n for n in present if n not in (*self.ignored, IGNORED)]
        last = self.first + len(self.classes) - 1
        if numbers and self.first == 0 and max(numbers) == last + 1:
            zero = " dataset.ignored=[0]" if 0 in numbers else ""
            return f": did you mean dataset.first=1{zero}? else set dataset.ignored=[{last + 1}]"
        return ": renumber the files, or list what does not count in dataset.ignored"

    def _table(self) -> Mapping[int, int]:
        ignored = dict.fromkeys((*self.ignored, IGNORED), IGNORED)
        return ignored | {self.first + i: i for i in range(len(self.classes))}


def renumbered(
    values: np.ndarray,
    table: Mapping[int, int],
    path: Path,
    cure: Callable[[Sequence[int]], str] = lambda present: "",
) -> np.ndarray:
    """Maps the numbers (H, W) of a file to classes, uint8 (H, W), by `table`.

    Args:
        values: the numbers.
        table: number to class.
        path: of the file.
        cure: gives the end of the message for a file with some numbers, of which one is no class.

    Raises:
        DataError: a number is not in the table; the message has the file's `path`.
    """
    present = np.unique(values)
    unknown = [int(number) for number in present if int(number) not in table]
    if unknown:
        ignored = f" or {IGNORED}" if IGNORED in table else ""
        raise DataError(
            f"the label map '{shown(path)}': expected {min(table)} to "
            f"{max(n for n in table if n != IGNORED)}{ignored}, got {unknown[0]}"
            f"{cure(present.tolist())}"
        )
    lookup = np.zeros(int(present.max()) + 1, np.uint8)
    lookup[present] = [table[int(number)] for number in present]
    return lookup[values]


def from_colours(path: Path, colours: Sequence[Colour]) -> np.ndarray:
    """The classes of a coloured label map, uint8 (H, W); 255 for other colours."""
    pixels = read_colours(path).astype(np.int64)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    labels = np.full(codes.shape, IGNORED, np.uint8)
    for number, (red, green, blue) in enumerate(colours):
        labels[codes == (red << 16 | green << 8 | blue)] = number
    return labels


def pairs(
    layout: Layout, images: str, labels: str, only: Sequence[str] | None = None
) -> list[PixelSample]:
    """The images of a folder, or those of a list, with the label maps of the same names in another.

    Raises:
        DataError: an image or a label map is missing; see `Layout.paired`.
    """
    found = layout.paired(images, labels, "label map", only=only)
    return [PixelSample(image, target, image.stem) for image, target in found]
