"""Published segmentation sets, and the union of all kinds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from data.labelled.embedded import EmbeddedSegmentation
from data.labelled.files import IGNORED, read_lines
from data.labelled.layout import Split
from data.labelled.segmentation_classes import (
    CAMVID,
    CITYSCAPES,
    COCO_COARSE,
    COCO_FINE_OF_171,
    LABELME_FACADE,
    PASCAL_CONTEXT,
    PASCAL_VOC,
)
from data.labelled.segmentation_files import (
    Colour,
    FolderSegmentation,
    PixelSample,
    SegmentationLayout,
    from_colours,
    pairs,
)


class ADE20K(SegmentationLayout):
    """ADE20K of the 2016 challenge: 150 classes; 0, `other`, is ignored."""

    tree: ClassVar[str] = (
        "  ADEChallengeData2016/images/{training,validation}/ADE_*.jpg\n"
        "  ADEChallengeData2016/annotations/{training,validation}/ADE_*.png\n"
        "  ADEChallengeData2016/objectInfo150.txt   (names of classes; may be missing)"
    )

    kind: Literal["ade20k"]

    @property
    def names(self) -> tuple[str, ...]:
        """The list in the download, else numbers."""
        path = self.root / "ADEChallengeData2016" / "objectInfo150.txt"
        if not path.is_file():
            return tuple(map(str, range(150)))
        return tuple(line.split("\t")[-1] for line in read_lines(path)[1:151])

    def samples(self, split: Split) -> list[PixelSample]:
        """20,210 training and 2,000 test images."""
        part = "training" if split == "train" else "validation"
        top = "ADEChallengeData2016"
        return pairs(self, f"{top}/images/{part}", f"{top}/annotations/{part}")

    def _table(self) -> Mapping[int, int]:
        return {0: IGNORED, IGNORED: IGNORED} | {k: k - 1 for k in range(1, 151)}


class PascalVOC(SegmentationLayout):
    """Pascal VOC 2012: 20 classes and the background; borders of objects are ignored.

    Attributes:
        train_set: `train`, 1,464 images; `trainaug`, 10,582 with those of `SegmentationClassAug`.
    """

    tree: ClassVar[str] = (
        "  VOCdevkit/VOC2012/JPEGImages/*.jpg\n"
        "  VOCdevkit/VOC2012/SegmentationClass/*.png      (SegmentationClassAug for trainaug)\n"
        "  VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt    (trainaug.txt)"
    )

    kind: Literal["pascal_voc"]
    train_set: Literal["train", "trainaug"] = "train"

    @property
    def names(self) -> tuple[str, ...]:
        """The background first."""
        return PASCAL_VOC

    def samples(self, split: Split) -> list[PixelSample]:
        """The images of the published lists."""
        top = ("VOCdevkit", "VOC2012")
        listed = self.train_set if split == "train" else "val"
        labels = "SegmentationClassAug" if listed == "trainaug" else "SegmentationClass"
        keys = read_lines(self.path(*top, "ImageSets", "Segmentation", f"{listed}.txt"))
        return pairs(self, "/".join((*top, "JPEGImages")), "/".join((*top, labels)), keys)


class Cityscapes(SegmentationLayout):
    """Cityscapes, fine labels: 19 classes, converted from the `labelIds` of the download."""

    tree: ClassVar[str] = (
        "  leftImg8bit/{train,val}/<city>/*_leftImg8bit.png\n"
        "  gtFine/{train,val}/<city>/*_gtFine_labelIds.png"
    )

    kind: Literal["cityscapes"]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the benchmark."""
        return tuple(CITYSCAPES)

    def samples(self, split: Split) -> list[PixelSample]:
        """2,975 training and 500 test images."""
        part = "train" if split == "train" else "val"
        images = self.glob("*/*_leftImg8bit.png", "leftImg8bit", part)
        keys = [path.name.removesuffix("_leftImg8bit.png") for path in images]
        labels = {
            path.parent.name + "/" + path.name: path
            for path in self.glob("*/*_gtFine_labelIds.png", "gtFine", part)
        }
        samples = []
        for image, key in zip(images, keys, strict=True):
            name = f"{image.parent.name}/{key}_gtFine_labelIds.png"
            if name not in labels:
                raise self.missing(f"there is no {self.root / 'gtFine' / part / name}")
            samples.append(PixelSample(image, labels[name], key))
        return samples

    def _table(self) -> Mapping[int, int]:
        void = dict.fromkeys((*range(34), IGNORED), IGNORED)  # -1, license plate, is stored as 255
        return void | {number: i for i, number in enumerate(CITYSCAPES.values())}


class COCOStuff(SegmentationLayout):
    """COCO-Stuff 164k: the 27 coarse classes of things and stuff, or all 171.

    Attributes:
        num_classes: 27 or 171.
        curated: whether to use only the images of the published lists, as upsampler papers do.
    """

    tree: ClassVar[str] = (
        "  images/{train,val}2017/*.jpg\n"
        "  annotations/{train,val}2017/*.png      (stuffthingmaps_trainval2017)\n"
        "  curated/{train,val}2017/Coco164kFull_Stuff_Coarse.txt    (with curated: true)"
    )

    kind: Literal["coco_stuff"]
    num_classes: Literal[27, 171] = 27
    curated: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the 27 coarse classes; the 171 fine ones have their numbers in the files."""
        fine = tuple(map(str, COCO_FINE_OF_171))
        return tuple(COCO_COARSE) if self.num_classes == 27 else fine

    def samples(self, split: Split) -> list[PixelSample]:
        """About 118,000 training and 5,000 test images."""
        part = "train2017" if split == "train" else "val2017"
        kept = None
        if self.curated:
            kept = read_lines(self.path("curated", part, "Coco164kFull_Stuff_Coarse.txt"))
        return pairs(self, f"images/{part}", f"annotations/{part}", kept)

    def _table(self) -> Mapping[int, int]:
        if self.num_classes == 171:
            known = {number: i for i, number in enumerate(COCO_FINE_OF_171)}
        else:
            known = {n: i for i, numbers in enumerate(COCO_COARSE.values()) for n in numbers}
        return dict.fromkeys((*range(182), IGNORED), IGNORED) | known


class PascalContext(SegmentationLayout):
    """Pascal Context: 59 classes.

    Attributes:
        background: whether all other pixels are a class too, the first of 60.
    """

    tree: ClassVar[str] = (
        "  VOCdevkit/VOC2010/JPEGImages/*.jpg\n"
        "  VOCdevkit/VOC2010/SegmentationClassContext/*.png    (0 background, 1 to 59)\n"
        "  VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt"
    )

    kind: Literal["pascal_context"]
    background: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        return ("background", *PASCAL_CONTEXT) if self.background else PASCAL_CONTEXT

    def samples(self, split: Split) -> list[PixelSample]:
        """4,996 training and 5,104 test images."""
        top, part = ("VOCdevkit", "VOC2010"), "train" if split == "train" else "val"
        keys = read_lines(self.path(*top, "ImageSets", "SegmentationContext", f"{part}.txt"))
        folder = "/".join(top)
        return pairs(self, f"{folder}/JPEGImages", f"{folder}/SegmentationClassContext", keys)

    def _table(self) -> Mapping[int, int]:
        if self.background:
            return {n: n for n in (*range(60), IGNORED)}
        return {0: IGNORED, IGNORED: IGNORED} | {n: n - 1 for n in range(1, 60)}


class CamVid(SegmentationLayout):
    """CamVid in the layout of SegNet's tutorial: 11 classes; 11, void, is ignored."""

    tree: ClassVar[str] = "  {train,test}/*.png      {train,test}annot/*.png    (0 to 10, 11 void)"

    kind: Literal["camvid"]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of SegNet."""
        return CAMVID

    def samples(self, split: Split) -> list[PixelSample]:
        """367 training and 233 test images."""
        return pairs(self, split, f"{split}annot")

    def _table(self) -> Mapping[int, int]:
        return {**super()._table(), 11: IGNORED}


class LabelMeFacade(SegmentationLayout):
    """LabelMeFacade: 8 classes by the colours of RGBA label maps; black, various, is ignored.

    Attributes:
        lists: files below the root with the names of training and of test images.
    """

    tree: ClassVar[str] = (
        "  images/*.jpg      labels/*.png    (colours)\n"
        "  train.txt      test.txt           (one name on each line; or the files of `lists`)"
    )

    kind: Literal["labelme_facade"]
    lists: tuple[str, str] = ("train.txt", "test.txt")

    @property
    def names(self) -> tuple[str, ...]:
        """In alphabetical order."""
        return tuple(LABELME_FACADE)

    def samples(self, split: Split) -> list[PixelSample]:
        """The images of the list."""
        lines = read_lines(self.path(self.lists[0] if split == "train" else self.lists[1]))
        return pairs(self, "images", "labels", [Path(line).stem for line in lines])

    @property
    def class_colours(self) -> tuple[Colour, ...]:
        """See `SegmentationLayout`."""
        return tuple(LABELME_FACADE.values())

    def _labels(self, path: Path) -> np.ndarray:
        return from_colours(path, self.class_colours)


AnySegmentation = Annotated[
    ADE20K
    | CamVid
    | Cityscapes
    | COCOStuff
    | EmbeddedSegmentation
    | FolderSegmentation
    | LabelMeFacade
    | PascalContext
    | PascalVOC,
    Field(discriminator="kind"),
]
