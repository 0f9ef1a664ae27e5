"""Images with several kinds of labels: Pascal Context and NYUDv2 as multi-task papers use them.

The layouts are those of the archives by ATRC (arXiv 2104.13874), which InvPT and MLoRE read too.
Boundaries are left out, as their metric needs a separate tool.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import Field

from data.errors import DataError
from data.image_files import warn_once
from data.labelled import pascal_context
from data.labelled.depth_files import read_depth
from data.labelled.files import IGNORED, read_lines, read_rgb
from data.labelled.layout import Layout, Split
from data.labelled.pixel_values import read_encoded_normals, read_indices, read_levels
from data.labelled.segmentation_classes import PASCAL_VOC
from data.labelled.segmentation_files import renumbered

Task = Literal["semseg", "parts", "saliency", "normals", "depth"]
_VOC_TABLE = {n: n for n in (*range(len(PASCAL_VOC)), IGNORED)}
_NYUD_TABLE = {0: IGNORED} | {number: number - 1 for number in range(1, 41)}
_LIST = {"train": "train", "test": "val"}  # names of the lists; both sets are tested on val


class MultiTaskSample(NamedTuple):
    """One image and its labels, all (H, W); None for tasks that the set lacks.

    Attributes:
        name: of the image, without suffix.
        image: uint8 (H, W, 3).
        semseg: uint8 class numbers; 255 is ignored.
        parts: uint8, 0 is background; 255 is ignored: whole images without a person.
        saliency: uint8, 1 salient and 0 not.
        normals: float32 (H, W, 3) unit vectors, 0 where unknown.
        depth: float32 in metres, 0 where unknown.
    """

    name: str
    image: np.ndarray
    semseg: np.ndarray
    parts: np.ndarray | None
    saliency: np.ndarray | None
    normals: np.ndarray
    depth: np.ndarray | None


class PascalContextLayout(Layout):
    """Pascal Context with four tasks: 4,998 training and 5,105 test images.

    `semseg` (21 classes of Pascal VOC) is read from `semseg/` if that folder exists, else from the
    459 classes of the `.mat` files. Normals and saliency are predictions of other networks, as in
    all work on this set. The published protocol counts normals only in some classes, by a list that
    is not in the archive; here they count wherever they are known.
    """

    tree: ClassVar[str] = (
        "  JPEGImages/*.jpg\n"
        "  pascal-context/trainval/*.mat\n"
        "  human_parts/*.mat\n"
        "  normals_distill/*.png\n"
        "  sal_distill/*.png\n"
        "  semseg/{VOC12,pascal-context}/*.png   (may be missing)\n"
        "  ImageSets/Context/{train,val}.txt     (one name on each line)"
    )
    tasks: ClassVar[tuple[Task, ...]] = ("semseg", "parts", "saliency", "normals")
    num_classes: ClassVar[dict[Task, int]] = {
        "semseg": len(PASCAL_VOC),
        "parts": len(pascal_context.PART_CLASSES),
    }

    kind: Literal["pascal_context"]

    def samples(self, split: Split) -> list[str]:
        """The names of a split's images, from its list; `test` is val.

        Raises:
            DataError: the list is missing.
        """
        return read_lines(self.path("ImageSets", "Context", f"{_LIST[split]}.txt"))

    def read(self, name: str) -> MultiTaskSample:
        """Reads one image and its labels.

        Raises:
            DataError: a file is missing, cannot be read, or has another size than the image.
        """
        image = read_rgb(self.path("JPEGImages", f"{name}.jpg"))
        path = self.path("sal_distill", f"{name}.png")
        saliency = read_levels(path, "saliency")
        if saliency.max() == 1:
            warn_once(path.parent, f"'{path.name}' has levels 0 and 1; salient is above 127")
        sample = MultiTaskSample(
            name,
            image,
            self._semseg(name),
            pascal_context.read_parts(self._parts(name), image.shape[:2]),
            (saliency > IGNORED // 2).astype(np.uint8),
            decode_normals(read_encoded_normals(self.path("normals_distill", f"{name}.png"))),
            None,
        )
        return _same_size(sample, self.root)

    def files(self, name: str) -> list[Path]:
        """The files of one image and its labels."""
        folders = {"JPEGImages": "jpg", "sal_distill": "png", "normals_distill": "png"}
        found = [self.root / folder / f"{name}.{suffix}" for folder, suffix in folders.items()]
        labels = [self.root / "pascal-context" / "trainval" / f"{name}.mat"]
        if (self.root / "semseg").is_dir():
            kinds = ("VOC12", "pascal-context")
            labels = [self.root / "semseg" / kind / f"{name}.png" for kind in kinds]
            labels = [path for path in labels if path.exists()][:1] or labels[1:]
        parts = self._parts(name)
        return [*found, *labels, *([] if parts is None else [parts])]

    def _semseg(self, name: str) -> np.ndarray:
        if (self.root / "semseg").is_dir():
            own = self.root / "semseg" / "VOC12" / f"{name}.png"
            path = own if own.exists() else self.path("semseg", "pascal-context", f"{name}.png")
            return renumbered(read_indices(path), _VOC_TABLE, path)
        return pascal_context.read_voc_classes(
            self.path("pascal-context", "trainval", f"{name}.mat")
        )

    def _parts(self, name: str) -> Path | None:
        """The file of an image's parts; None if it has none."""
        path = self.path("human_parts") / f"{name}.mat"
        return path if path.exists() else None


class NyudLayout(Layout):
    """NYUDv2 with three tasks: 795 training and 654 test images.

    The files have 0 for unlabelled pixels and 1 to 40 for classes, which become 255 and 0 to 39.
    """

    tree: ClassVar[str] = (
        "  images/*.png\n"
        "  segmentation/*.png\n"
        "  depth/*.npy          (metres)\n"
        "  normals/*.png\n"
        "  gt_sets/{train,val}.txt   (one name on each line)"
    )
    tasks: ClassVar[tuple[Task, ...]] = ("semseg", "normals", "depth")
    num_classes: ClassVar[dict[Task, int]] = {"semseg": 40}

    kind: Literal["nyud"]

    def samples(self, split: Split) -> list[str]:
        """See `PascalContextLayout.samples`."""
        return read_lines(self.path("gt_sets", f"{_LIST[split]}.txt"))

    def read(self, name: str) -> MultiTaskSample:
        """See `PascalContextLayout.read`."""
        sample = MultiTaskSample(
            name,
            read_rgb(self.path("images", f"{name}.png")),
            self._semseg(self.path("segmentation", f"{name}.png")),
            None,
            None,
            decode_normals(read_encoded_normals(self.path("normals", f"{name}.png"))),
            read_depth(self.path("depth", f"{name}.npy"), 1.0),
        )
        return _same_size(sample, self.root)

    def files(self, name: str) -> list[Path]:
        """See `PascalContextLayout.files`."""
        folders = {"images": "png", "segmentation": "png", "normals": "png", "depth": "npy"}
        return [self.root / folder / f"{name}.{suffix}" for folder, suffix in folders.items()]

    def _semseg(self, path: Path) -> np.ndarray:
        return renumbered(read_indices(path), _NYUD_TABLE, path)


MultiTaskLayout: TypeAlias = Annotated[
    PascalContextLayout | NyudLayout, Field(discriminator="kind")
]


def decode_normals(colours: np.ndarray) -> np.ndarray:
    """Decodes unit normals, float32 (H, W, 3), from colours, uint8 (H, W, 3): -1 to 1 as 0 to 255.

    Unknown normals, black or grey in files (of a length far from one), become zero vectors.
    """
    vectors = colours.astype(np.float32) * (2 / 255) - 1
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = (lengths > 0.5) & (lengths < 1.5)
    return np.where(known, vectors / np.maximum(lengths, 1e-6), 0).astype(np.float32)


def _same_size(sample: MultiTaskSample, root: Path) -> MultiTaskSample:
    height, width = sample.image.shape[:2]
    for task, labels in zip(sample._fields[2:], sample[2:], strict=True):
        if labels is not None and labels.shape[:2] != (height, width):
            size = " x ".join(map(str, labels.shape[:2]))
            raise DataError(
                f"{root}: {task} of {sample.name} has {size} px, its image {height} x {width} px"
            )
    return sample
