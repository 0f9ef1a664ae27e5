"""Depth sets: images with depth, and with normals where the set has them.

Depth is float32 in metres, normals are unit vectors; both 0 where unknown, on the image's pixels.
"""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt

from data.errors import DataError
from data.labelled.depth_files import DEPTH_EXTENSIONS, Window, read_depth, read_normals
from data.labelled.files import read_json, read_lines, read_rgb, read_size
from data.labelled.layout import Layout, Split

_MILLIMETRE = 0.001


class DepthSample(NamedTuple):
    """The files of one image.

    Attributes:
        image: file of the image.
        depth: file of its depth.
        key: the name in messages.
        focal_px: focal length in pixels of the stored image; None if unknown.
        normals: file of its normals; None if there is none.
    """

    image: Path
    depth: Path
    key: str
    focal_px: float | None = None
    normals: Path | None = None


class DepthView(NamedTuple):
    """An image with its depth.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        depth: float32 (H, W) in metres, 0 where unknown.
        normals: float32 (H, W, 3) of unit length, 0 where unknown, the first component to the
            right; None if there is no file.
        focal_px: focal length in pixels of this image; None if unknown.
        centre: (row, column) of the principal point in pixels: the centre of the stored image.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray | None
    focal_px: float | None
    centre: tuple[float, float]


class DepthLayout(Layout):
    """A set of images with depth."""

    @abstractmethod
    def samples(self, split: Split) -> list[DepthSample]:
        """The images of a split, in a fixed order.

        Raises:
            DataError: files are missing; the message shows the expected tree.
        """

    def read(self, sample: DepthSample) -> DepthView:
        """Reads an image, its depth and its normals.

        Raises:
            DataError: a file cannot be read, or the sizes differ.
        """
        image = read_rgb(self.existing(sample.image))
        depth = read_depth(self.existing(sample.depth), self._unit())
        normals = None if sample.normals is None else read_normals(sample.normals)
        for name, path, values in (
            ("depth", sample.depth, depth),
            ("normals", sample.normals, normals),
        ):
            if values is not None and values.shape[:2] != image.shape[:2]:
                raise DataError(
                    f"the {name} '{path}' is {values.shape[0]} x {values.shape[1]}, its image "
                    f"{image.shape[0]} x {image.shape[1]}"
                )
        middle = (image.shape[0] / 2, image.shape[1] / 2)
        return DepthView(image, depth, normals, sample.focal_px, middle)

    def _unit(self) -> float:
        """Metres of one step of the stored depth."""
        return _MILLIMETRE


class FolderDepth(DepthLayout):
    """Any folders of images and of depth, and normals, of the same names.

    Attributes:
        train: folders of training images and of their depth, below the root.
        test: folders of test images and of their depth.
        unit: metres of one step of the stored depth: of an 8 or 16 bit PNG, of a
            TIFF, or of a `.npy` (H, W).
        focal_px: focal length in pixels; needed to compute normals from depth.
        normals: folders of normals for both splits: PNGs (-1 to 1 as 0 to 255) or `.npy` (H, W, 3).
        window: the part of every image and depth that is used; None for all.
    """

    tree: ClassVar[str] = (
        "  {train,test}/rgb/*.jpg (or png, webp)      {train,test}/depth/*.png or *.npy or *.tif\n"
        "(or the folders of `train` and `test`)"
    )

    kind: Literal["folder"]
    train: tuple[str, str] = ("train/rgb", "train/depth")
    test: tuple[str, str] = ("test/rgb", "test/depth")
    unit: PositiveFloat = _MILLIMETRE
    focal_px: PositiveFloat | None = None
    normals: tuple[str, str] | None = None
    window: Window | None = None

    def samples(self, split: Split) -> list[DepthSample]:
        """All images of the split's folder."""
        images, depth = self.train if split == "train" else self.test
        found = self.paired(images, depth, "depth", DEPTH_EXTENSIONS)
        normals: list[Path | None] = [None] * len(found)
        if self.normals is not None:
            where = self.normals[split == "test"]
            normals = [n for _, n in self.paired(images, where, "normals", DEPTH_EXTENSIONS)]
        return [
            DepthSample(image, values, image.stem, self.focal_px, normal)
            for (image, values), normal in zip(found, normals, strict=True)
        ]

    def read(self, sample: DepthSample) -> DepthView:
        """Reads the files and crops the window; see `DepthLayout.read`."""
        view = super().read(sample)
        return view if self.window is None else _cut(view, self.window, sample.key)

    def _unit(self) -> float:
        return self.unit


class NYUv2(DepthLayout):
    """NYU Depth v2 as unpacked by the code of BTS: about 24,000 training and 654 test images.

    Attributes:
        train_root: the folder, below the root, that the paths of `nyu_train.txt` start at.
        test_root: the same of `nyu_test.txt`; `official_splits/test` in the download of BTS.
    """

    tree: ClassVar[str] = (
        "  nyu_train.txt      nyu_test.txt    (one line for each image: RGB DEPTH FOCAL)\n"
        "  <scene>/rgb_*.jpg      <scene>/sync_depth_*.png    (16 bit, millimetres)"
    )

    kind: Literal["nyuv2"]
    train_root: str = "."
    test_root: str = "."

    def samples(self, split: Split) -> list[DepthSample]:
        """The lines of the published list."""
        name = f"nyu_{split}.txt"
        root = self.path(self.train_root if split == "train" else self.test_root)
        samples = []
        for line in read_lines(self.path(name)):
            try:
                rgb, depth, focal = line.split()
                if not 0 < float(focal) < math.inf:
                    raise ValueError(focal)
                samples.append(
                    DepthSample(
                        root / rgb.lstrip("/"),
                        root / depth.lstrip("/"),
                        rgb.lstrip("/").removesuffix(".jpg"),
                        float(focal),
                    )
                )
            except ValueError:
                raise DataError(f"{name}: expected lines RGB DEPTH FOCAL, got {line!r}") from None
        return samples


class NaviDepth(DepthLayout):
    """NAVI: multi-view images of objects for training, the same objects in the wild for the test.

    Images are cropped to the square around the object, inside the image, and resized.

    Attributes:
        side: pixels that the square is resized to.
        unit: metres of one step of the stored depth.
        downsampled: whether to read `downsampled_images` and `downsampled_depth`.
    """

    tree: ClassVar[str] = (
        "  <object>/multiview_*/{images,depth}/*      <object>/multiview_*/annotations.json\n"
        "  <object>/wild_set/{images,depth}/*         <object>/wild_set/annotations.json"
    )

    kind: Literal["navi"]
    side: PositiveInt = 512
    unit: PositiveFloat = _MILLIMETRE
    downsampled: bool = False

    def samples(self, split: Split) -> list[DepthSample]:
        """All images of all objects."""
        scenes = "multiview_*" if split == "train" else "wild_set"
        prefix = "downsampled_" if self.downsampled else ""
        samples = []
        for path in self.glob(f"*/{scenes}/annotations.json"):
            scene = path.parent
            for entry in _entries(path):
                image = scene / f"{prefix}images" / entry["filename"]
                depth = scene / f"{prefix}depth" / f"{image.stem}.png"
                key = f"{scene.parent.name}/{scene.name}/{image.stem}"
                samples.append(DepthSample(image, depth, key, self._focal_px(entry, image)))
        return samples

    def _focal_px(self, entry: dict[str, Any], image: Path) -> float:
        """The focal length in pixels of the stored image; annotations are for the full size."""
        focal = float(entry["camera"]["focal_length"])
        if not self.downsampled:
            return focal
        return focal * max(read_size(image)) / max(entry["image_size"])

    def read(self, sample: DepthSample) -> DepthView:
        """Reads the files and crops the object; see `DepthLayout.read`."""
        view = super().read(sample)
        rows, columns = np.nonzero(view.depth)
        if not len(rows):
            raise DataError(f"the depth '{sample.depth}' has no pixel of the object")
        view = _cut(view, _square(rows, columns, view.depth.shape), sample.key)
        side, stored = self.side, view.depth.shape[0]
        image = Image.fromarray(view.image).resize((side, side), Image.Resampling.BILINEAR)
        # Nearest neighbours: averages across the object's edge are no depths of anything.
        places = ((np.arange(side) + 0.5) * stored / side).astype(int)
        focal = None if view.focal_px is None else view.focal_px * side / stored
        return DepthView(
            np.asarray(image),
            view.depth[np.ix_(places, places)],
            None,
            focal,
            (view.centre[0] * side / stored, view.centre[1] * side / stored),
        )

    def _unit(self) -> float:
        return self.unit


AnyDepth = Annotated[FolderDepth | NaviDepth | NYUv2, Field(discriminator="kind")]


def _entries(path: Path) -> list[dict[str, Any]]:
    """The annotations of a scene of NAVI."""
    try:
        entries: list[dict[str, Any]] = read_json(path)
        for entry in entries:
            entry["filename"], entry["image_size"], entry["camera"]["focal_length"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the annotations '{path}': {error!r}; expected a list of images, each with filename, "
            "image_size and camera.focal_length"
        ) from error
    return entries


def _cut(view: DepthView, window: Window, name: str) -> DepthView:
    height, width = view.depth.shape
    part = window.slices(height, width, name)
    return DepthView(
        view.image[part],
        view.depth[part],
        None if view.normals is None else view.normals[part],
        view.focal_px,
        (view.centre[0] - window.rows[0], view.centre[1] - window.columns[0]),
    )


def _square(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> Window:
    """The smallest square around some pixels inside an image; at most the image's shorter side."""
    side = int(min(max(np.ptp(rows), np.ptp(columns)) + 1, *shape))
    ends = []
    for places, length in zip((rows, columns), shape, strict=True):
        first = (int(places.min()) + int(places.max()) + 1 - side) // 2
        first = min(max(first, 0), length - side)
        ends.append((first, first + side))
    return Window(rows=ends[0], columns=ends[1])
