"""Images with boxes in COCO's layout, and their placement on a canvas of one size."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image

from data.errors import DataError
from data.labelled.files import read_json, read_rgb
from data.labelled.layout import Layout, Split

_PADDING = 128  # mid-grey, close to the mean that encoders subtract
_YEAR_SPLIT = {"train": "train2017", "test": "val2017"}


class Objects(NamedTuple):
    """The annotated objects of one image.

    Attributes:
        boxes: (N, 4) float64, left, top, right, bottom in pixels of the stored image.
        labels: (N,) int64 class numbers, from 0.
        areas: (N,) float64 in pixels, which decide between small, medium and large.
        crowds: (N,) bool; a crowd is a region of many objects, which neither trains nor counts.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray


class AnnotatedImage(NamedTuple):
    """An image and its objects; `size` is (H, W) in pixels."""

    path: Path
    size: tuple[int, int]
    objects: Objects


class DetectionSet(NamedTuple):
    """One split: the names of the classes, and the images in the order of their ids."""

    classes: tuple[str, ...]
    images: tuple[AnnotatedImage, ...]


class CocoLayout(Layout):
    """COCO's instances, or your own set in the same format."""

    tree: ClassVar[str] = (
        "  train2017/*.jpg\n"
        "  val2017/*.jpg\n"
        "  annotations/instances_train2017.json\n"
        "  annotations/instances_val2017.json"
    )

    kind: Literal["coco"] = "coco"

    def load(self, split: Split) -> DetectionSet:
        """Reads the annotations of a split, but no image; `test` is val2017.

        Raises:
            DataError: the files are missing, or not in COCO's format.
        """
        name = _YEAR_SPLIT[split]
        folder = self.path(name)
        path = self.path("annotations", f"instances_{name}.json")
        try:
            return _annotated(read_json(path), folder)
        except KeyError as error:
            raise DataError(
                f"'{path}' is not in COCO's format: an entry lacks the key {error}"
            ) from error
        except (ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"'{path}' is not in COCO's format: {error}") from error


def _annotated(tree: Mapping[str, Any], folder: Path) -> DetectionSet:
    _check_ids(tree)
    categories = sorted(tree["categories"], key=lambda category: int(category["id"]))
    number = {category["id"]: i for i, category in enumerate(categories)}
    of_image: dict[int, list[Mapping[str, Any]]] = {entry["id"]: [] for entry in tree["images"]}
    for mark in tree["annotations"]:
        of_image[mark["image_id"]].append(mark)
    images = tuple(
        AnnotatedImage(
            folder / entry["file_name"],
            (int(entry["height"]), int(entry["width"])),
            _objects(of_image[entry["id"]], number),
        )
        for entry in sorted(tree["images"], key=lambda entry: int(entry["id"]))
    )
    if not images:
        raise ValueError("no images")
    return DetectionSet(tuple(str(category["name"]) for category in categories), images)


def _check_ids(tree: Mapping[str, Any]) -> None:
    """Raises ValueError where ids are not unique, or name what the file does not have."""
    if not isinstance(tree, Mapping):
        raise ValueError(
            "expected a mapping with images, annotations and categories, got a "
            f"{type(tree).__name__}"
        )
    known = {}
    for noun, section in (("image", "images"), ("category", "categories")):
        ids = Counter(entry["id"] for entry in tree[section])
        twice = [each for each, times in ids.items() if times > 1]
        if twice:
            others = f", and so do {len(twice) - 1} others" if len(twice) > 1 else ""
            raise ValueError(f"the {noun} id {twice[0]} occurs more than once{others}")
        known[noun] = ids
    names = Counter(entry["name"] for entry in tree["categories"])
    shared = [name for name, times in names.items() if times > 1]
    if shared:
        raise ValueError(f"two categories are named {shared[0]!r}")
    for mark in tree["annotations"]:
        for noun, ids in known.items():
            if mark[f"{noun}_id"] not in ids:
                raise ValueError(
                    f"annotation {mark.get('id', 'without id')} has {noun}_id "
                    f"{mark[f'{noun}_id']!r}, and none of the {len(ids)} entries of "
                    f"{noun if noun == 'image' else 'categorie'}s has this id"
                )


def _objects(marks: list[Mapping[str, Any]], number: Mapping[int, int]) -> Objects:
    for mark in marks:
        try:
            values = np.array([*mark["bbox"], mark["area"]], np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if len(values) != 5 or not np.isfinite(values).all():
            raise ValueError(
                f"annotation {mark.get('id', 'without id')}: expected a bbox of four finite "
                f"numbers and an area, got {mark['bbox']!r} and {mark['area']!r}"
            )
    boxes = np.array([mark["bbox"] for mark in marks], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # COCO writes left, top, width, height
    return Objects(
        boxes,
        np.array([number[mark["category_id"]] for mark in marks], np.int64),
        np.array([float(mark["area"]) for mark in marks], np.float64),
        np.array([mark.get("iscrowd", 0) for mark in marks], bool),
    )


class Placement(NamedTuple):
    """The placement of an image at the top left of a canvas.

    Attributes:
        scale: (vertical, horizontal) pixels of the canvas for one of the image.
        size: (H, W) in pixels of the canvas that the image covers.
        flipped: whether the image is mirrored left to right.
    """

    scale: tuple[float, float]
    size: tuple[int, int]
    flipped: bool

    def to_canvas(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of the image on the canvas; coordinates are of edges, not of pixels."""
        vertical, horizontal = self.scale
        return self._flip(boxes * (horizontal, vertical, horizontal, vertical))

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4) of the canvas in the image, clipped to its border."""
        height, width = self.size
        vertical, horizontal = self.scale
        inside = self._flip(boxes).clip(0, (width, height, width, height))
        return inside / (horizontal, vertical, horizontal, vertical)

    def _flip(self, boxes: np.ndarray) -> np.ndarray:
        if not self.flipped:
            return boxes
        left, top, right, bottom = boxes.T
        width = self.size[1]
        return np.stack([width - right, top, width - left, bottom], axis=1)


def place_on_canvas(
    pixels: np.ndarray, canvas: tuple[int, int], *, flipped: bool
) -> tuple[np.ndarray, Placement]:
    """Resizes an image to fit a canvas, keeping its aspect ratio, and pads right and below in grey.

    Args:
        pixels: uint8 (H, W, 3); resized bicubically with antialias.
        canvas: (height, width) in pixels.
        flipped: whether to mirror it left to right.

    Returns:
        The canvas, uint8 (height, width, 3), and the placement.
    """
    height, width = pixels.shape[:2]
    ratio = min(canvas[0] / height, canvas[1] / width)
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    resized = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
    out = np.full((*canvas, 3), _PADDING, np.uint8)
    content = np.asarray(resized)
    out[: size[0], : size[1]] = content[:, ::-1] if flipped else content
    return out, Placement((size[0] / height, size[1] / width), size, flipped)


def read_annotated(image: AnnotatedImage) -> np.ndarray:
    """The pixels of an image, uint8 (H, W, 3).

    Raises:
        DataError: it cannot be read, or has another size than its annotations.
    """
    pixels = read_rgb(image.path)
    if pixels.shape[:2] != image.size:
        stored, wanted = (f"{h} x {w}" for h, w in (pixels.shape[:2], image.size))
        raise DataError(
            f"the image '{image.path}' has {stored} px, but its annotations are for {wanted} px"
        )
    return pixels
