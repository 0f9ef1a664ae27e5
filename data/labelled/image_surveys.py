"""Surveys of images by class, of images with captions, and of images without labels."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from data.config import MAX_PIXELS
from data.decode import open_image, to_rgb
from data.errors import DataError
from data.gather import open_images
from data.image_files import IMAGE_EXTENSIONS, IMAGES, extension_of
from data.labelled.captions import CaptionLayout
from data.labelled.class_counts import judge_classes
from data.labelled.class_folders import ClassFolders, ClassImages
from data.labelled.layout import Split
from data.labelled.survey import Finding, Survey, listed, per_cent
from data.shards import tar_files
from data.text import shown


def decode_first(data: bytes, name: str) -> None:
    """Decodes an image, to see that it is one.

    Raises:
        DataError: it is not.
    """
    try:
        to_rgb(open_image(data, MAX_PIXELS))
    except Exception as error:  # Pillow's plugins raise exceptions of many types
        raise DataError(f"the image '{shown(name)}': {error}") from error


class ClassFolderSurvey(Survey):
    """Counts the images of each class.

    Args:
        dataset: one folder for each class.
        splits: those that are read.
        extra: what else identifies the data, such as the names of the classes.
        neighbours: numbers of training images that vote, if they do.
    """

    noun = "images"

    def __init__(
        self,
        dataset: ClassFolders,
        splits: Sequence[str],
        extra: str = "",
        neighbours: Sequence[int] = (),
    ) -> None:
        self.extra, self._neighbours = extra, neighbours
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._dataset, self._counts, self._files = dataset, dict[str, Any](), list[Path]()
        classes: list[str] | None = None
        for split in (each for each in get_args(Split) if each in splits):
            with dataset.open(split, classes) as images:
                classes = images.classes
                self._counts[split] = self._listed(split, images)
        self.classes = classes or []

    def _listed(self, split: str, images: ClassImages) -> dict[str, Any]:
        source, own = self.root, self.root.is_dir()
        folder = "train" if split == "train" else self._dataset.test
        for name in images.names[:1]:
            decode_first(images.read(name), f"{source}/{folder}/{name}" if own else name)
        if own:
            source = source / folder
            self._files += [source / name for name in images.names]
        elif source not in self._files:
            self._files.append(source)
        numbers = Counter(images.labels)
        folders = {p.name for p in source.iterdir() if p.is_dir()} if source.is_dir() else set()
        found = {name.split("/")[0] for name in images.names}
        empty = sorted(folders - found) if self._dataset.num_classes is None else []
        return {
            "images": len(images.names),
            "classes": [numbers[i] for i in range(len(images.classes))],
            "empty_folders": [name for name in empty if not name.startswith(".")],
        }

    def files(self) -> list[Path]:
        """See `Survey.files`."""
        return self._files

    def parsed(self) -> str:
        """What was given beside the files."""
        return self.extra

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        return self._counts

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        by_class = {split: each["classes"] for split, each in counts.items()}
        if len(self.classes) < 2:
            text = f"there is one class only, {self.classes[0]!r}"
            return [Finding(text, fatal=True, final=True)]
        findings = judge_classes(self.classes, by_class, "image")
        for split, each in counts.items():
            empty = [name for name in each["empty_folders"] if name not in self.classes]
            if empty:
                text = f"{len(empty)} folders of {split} hold no image ({listed(empty)})"
                findings.append(Finding(f"{text}: they are no classes"))
        return findings + self._judge_numbers(by_class.get("train", []))

    def _judge_numbers(self, train: Sequence[int]) -> list[Finding]:
        """Warnings where the recipe asks for more training images than there are."""
        findings, shots = [], self._dataset.shots or 0
        few = [f"{name} {n}" for name, n in zip(self.classes, train, strict=False) if n < shots]
        if few:
            text = f"{len(few)} of {len(train)} classes have fewer than {shots} training images"
            findings.append(Finding(f"{text} ({listed(few)}): all of theirs are used"))
        beyond = [k for k in self._neighbours if k > sum(train)]
        if beyond:
            text = f"neighbours {', '.join(map(str, beyond))}: there are {sum(train)} training"
            findings.append(Finding(f"{text} images, and all of them vote"))
        return findings


class CaptionSurvey(Survey):
    """Counts captions.

    Args:
        dataset: images with captions.
        extra: what else identifies the data.
    """

    noun = "captions"

    def __init__(self, dataset: CaptionLayout, extra: str = "") -> None:
        self._extra = extra
        self.root, self.tree = dataset.root, dataset.tree
        self.options = dataset.model_dump_json()
        self._names, self._captions, _ = dataset.load()

    def files(self) -> list[Path]:
        """See `Survey.files`; without the captions, which `parsed` has."""
        return list(dict.fromkeys(map(Path, self._names)))

    def parsed(self) -> str:
        """The captions."""
        return repr(self._captions) + self._extra

    def count(self) -> dict[str, Any]:
        """See `Survey.count`."""
        decode_first(Path(self._names[0]).read_bytes(), self._names[0])
        texts = [text for group in self._captions for text in group]
        twice = [name for name, times in Counter(self._names).items() if times > 1]
        return {
            "images": len(self._names),
            "captions": len(texts),
            "blank": sum(not text.strip() for text in texts),
            "repeated_images": twice,
        }

    def judge(self, counts: dict[str, Any]) -> list[Finding]:
        """See `Survey.judge`."""
        findings, blank, twice = [], counts["blank"], counts["repeated_images"]
        if twice:
            text = f"{len(twice)} images occur more than once ({listed(twice)})"
            findings.append(Finding(f"{text}: each would count several times", fatal=True))
        if blank:
            share = per_cent(blank, counts["captions"])
            text = f"{blank} of {counts['captions']} captions ({share}) are without text"
            findings.append(Finding(text, fatal=blank == counts["captions"]))
        if counts["images"] < 2:
            findings.append(Finding("there is one image only", fatal=True, final=True))
        elif len({text for group in self._captions for text in group}) < 2 and not blank:
            text = f"all {counts['captions']} captions are the same: nothing tells images apart"
            findings.append(Finding(text, fatal=True))
        return findings


class ImagesSurvey(Survey):
    """Lists images without labels: a folder, an archive, shards or one image.

    Args:
        source: of the images.
    """

    noun = "images"
    tree = "  a folder, archive or shards of images"

    def __init__(self, source: Path) -> None:
        self.root = source if source.is_dir() else source.parent
        if source.is_file() and extension_of(source.name) in IMAGE_EXTENSIONS:
            self._files = [source]
            decode_first(source.read_bytes(), str(source))
            return
        shards = tar_files(source) if source.is_dir() else []
        self._files = list(shards or [] if source.is_dir() else [source])
        with open_images(shards[0] if shards else source) as images:
            for name in list(images.readable(source).sizes)[:1]:
                decode_first(images.read(name), f"{source}/{name}")
            if not images.sizes:
                raise DataError(f"no image ({IMAGES}) in {shown(source)}")
            if not self._files:
                self._files = [source / name for name in images.sizes]

    def files(self) -> list[Path]:
        """See `Survey.files`."""
        return self._files
