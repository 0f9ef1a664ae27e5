"""Depth sets: images with depth in metres, and where there are, normals, in the layouts on disk.

Depth leaves here as float32 metres, 0 where it is unknown, normals as unit vectors, 0 where they
are unknown, on the pixels of the image.
"""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt

from data.errors import DataError
from data.labelled.depth_files import Window, read_depth, read_normals
from data.labelled.files import read_lines, read_rgb
from data.labelled.layout import Layout, Split

_MILLIMETRE = 0.001


class DepthSample(NamedTuple):
    """One image and its depth, as files.

    Attributes:
        image: the picture.
        depth: its depth.
        key: the name that messages and pictures use.
        focal_px: of the camera, in pixels of the stored image; None where it is unknown.
        normals: a file of normals; None where there is none.
    """

    image: Path
    depth: Path
    key: str
    focal_px: float | None = None
    normals: Path | None = None


class DepthView(NamedTuple):
    """What a sample holds.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        depth: float32 (H, W) in metres, 0 where unknown.
        normals: float32 (H, W, 3), the first component to the right, unit length or 0; None
            where there is no file of them.
        focal_px: of the camera, in these pixels; None where it is unknown.
        centre: (row, column) that the camera looks at, from the top left corner of these pixels:
            the middle of the stored image.
    """

    image: np.ndarray
    depth: np.ndarray
    normals: np.ndarray | None
    focal_px: float | None
    centre: tuple[float, float]


class DepthLayout(Layout):
    """What every set of images with depth has."""

    @abstractmethod
    def samples(self, split: Split) -> list[DepthSample]:
        """The images of a split, in an order that does not change.

        Raises:
            DataError: files are missing; shows the expected tree.
        """

    def read(self, sample: DepthSample) -> DepthView:
        """Reads an image, its depth and its normals.

        Raises:
            DataError: a file cannot be read, or the sizes differ.
        """
        image, depth = read_rgb(sample.image), read_depth(sample.depth, self._unit())
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
        """Metres of a step of a stored depth."""
        return _MILLIMETRE


class FolderDepth(DepthLayout):
    """Any folders of images and of depth, and normals, of the same names.

    Attributes:
        train: folders of images and of depth to train on, below the root.
        test: the same to measure on.
        unit: metres of a step of the stored depth: of an 8 or 16 bit PNG, or of a `.npy` (H, W).
        focal_px: of the camera, in pixels; needed for normals that are computed from depth.
        normals: folders of normals to train on and to measure on: PNGs whose 0 to 255 stand for
            -1 to 1, or `.npy` (H, W, 3).
        window: the part of every image and depth that is used; None for all of them.
    """

    tree: ClassVar[str] = (
        "  {train,test}/rgb/*.jpg or *.png      {train,test}/depth/*.png or *.npy\n"
        "(or what `train` and `test` name)"
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
        found = [*self.place(images).glob("*.jpg"), *self.place(images).glob("*.png")]
        if not found:
            self.found("*.jpg", images)  # whose message has the tree
        normals = None if self.normals is None else self.normals[split == "test"]
        return [
            DepthSample(
                image,
                self._beside(depth, image.stem),
                image.stem,
                self.focal_px,
                None if normals is None else self._beside(normals, image.stem),
            )
            for image in sorted(found)
        ]

    def read(self, sample: DepthSample) -> DepthView:
        """Reads the files and cuts out the window; see `DepthLayout.read`."""
        view = super().read(sample)
        return view if self.window is None else _cut(view, self.window, sample.key)

    def _beside(self, folder: str, stem: str) -> Path:
        for suffix in (".png", ".npy"):
            if (self.place(folder) / f"{stem}{suffix}").is_file():
                return self.place(folder) / f"{stem}{suffix}"
        return self.place(folder, f"{stem}.png")  # raises, and shows the tree

    def _unit(self) -> float:
        return self.unit


class NYUv2(DepthLayout):
    """NYU Depth v2 as the code of BTS unpacks it: about 24,000 to train on, 654 to measure on.

    Attributes:
        train_root: the folder that the paths of the first list start at, below the root.
        test_root: the same of the second one; `official_splits/test` in the download of BTS.
    """

    tree: ClassVar[str] = (
        "  nyu_train.txt      nyu_test.txt    (a line an image: RGB DEPTH FOCAL)\n"
        "  <scene>/rgb_*.jpg      <scene>/sync_depth_*.png    (16 bit, millimetres)"
    )

    kind: Literal["nyuv2"]
    train_root: str = "."
    test_root: str = "."

    def samples(self, split: Split) -> list[DepthSample]:
        """The lines of the published list."""
        name = f"nyu_{split}.txt"
        root = self.place(self.train_root if split == "train" else self.test_root)
        samples = []
        for line in read_lines(self.place(name)):
            try:
                rgb, depth, focal = line.split()
                samples.append(
                    DepthSample(
                        root / rgb.lstrip("/"),
                        root / depth.lstrip("/"),
                        rgb.lstrip("/").removesuffix(".jpg"),
                        float(focal),
                    )
                )
            except ValueError:
                raise DataError(f"{name}: {line!r}; a line is RGB DEPTH FOCAL") from None
        return samples


class NAVI(DepthLayout):
    """NAVI: objects from many sides to train on, the same objects in the wild to measure on.

    An image is cut to the square around its object, as far as the image reaches, and resized.

    Attributes:
        side: pixels of that square, along both axes.
        unit: metres of a step of the stored depth.
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
        for path in self.found(f"*/{scenes}/annotations.json"):
            scene = path.parent
            for entry in _entries(path):
                image = scene / f"{prefix}images" / entry["filename"]
                depth = scene / f"{prefix}depth" / f"{image.stem}.png"
                key = f"{scene.parent.name}/{scene.name}/{image.stem}"
                samples.append(DepthSample(image, depth, key, self._focal_px(entry, image)))
        return samples

    def _focal_px(self, entry: dict[str, Any], image: Path) -> float:
        """The focal length in pixels of the stored file; the annotation's is of the full size."""
        focal = float(entry["camera"]["focal_length"])
        if not self.downsampled:
            return focal
        try:
            with Image.open(image) as opened:  # reads the header only
                return focal * max(opened.size) / max(entry["image_size"])
        except OSError as error:
            raise DataError(f"the image '{image}': {error}") from error

    def read(self, sample: DepthSample) -> DepthView:
        """Reads the files and cuts out the object; see `DepthLayout.read`."""
        view = super().read(sample)
        rows, columns = np.nonzero(view.depth)
        if not len(rows):
            raise DataError(f"the depth '{sample.depth}' knows no pixel of the object")
        view = _cut(view, _square(rows, columns, view.depth.shape), sample.key)
        side, stored = self.side, view.depth.shape[0]
        image = Image.fromarray(view.image).resize((side, side), Image.Resampling.BILINEAR)
        # The nearest: means across the object's edge are depths that nothing has.
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


AnyDepth = Annotated[FolderDepth | NAVI | NYUv2, Field(discriminator="kind")]


def _entries(path: Path) -> list[dict[str, Any]]:
    """The annotations of a scene of NAVI."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())
        for entry in entries:
            entry["filename"], entry["image_size"], entry["camera"]["focal_length"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the annotations '{path}': {error!r}; a list of images is due, each with filename, "
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
    """The smallest square around some pixels, moved into an image; the image's side at most."""
    side = int(min(max(np.ptp(rows), np.ptp(columns)) + 1, *shape))
    ends = []
    for places, length in zip((rows, columns), shape, strict=True):
        first = (int(places.min()) + int(places.max()) + 1 - side) // 2
        first = min(max(first, 0), length - side)
        ends.append((first, first + side))
    return Window(rows=ends[0], columns=ends[1])
