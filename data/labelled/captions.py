"""Images with captions: COCO's own files, and the Karpathy splits of COCO and Flickr30k."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PositiveInt

from data.errors import DataError
from data.labelled.files import read_csv, read_json
from data.labelled.layout import Layout, is_there
from data.text import shown


class CaptionedImages(NamedTuple):
    """Images and their captions.

    Attributes:
        names: paths of the images.
        captions: of each image, at least one.
        read: returns the bytes of an image by its name; thread-safe.
    """

    names: list[str]
    captions: list[list[str]]
    read: Callable[[str], bytes]


class CaptionLayout(Layout):
    """A set of images with captions.

    Attributes:
        captions_per_image: the number of captions that are used, the first in the file; five in
            published results. None for all.
    """

    captions_per_image: PositiveInt | None = 5

    def load(self) -> CaptionedImages:
        """Reads all captions, and checks that every image exists.

        Raises:
            DataError: a file is missing or has another format, or an image has no caption.
        """
        names, captions = [], []
        for path, texts in self._pairs():
            if not is_there(path):
                raise self.missing(f"there is no {path}")
            if not texts:
                raise DataError(f"the image '{shown(path)}' has no caption")
            names.append(str(path))
            captions.append([_readable(text) for text in texts[: self.captions_per_image]])
        if not names:
            raise self.missing("no image with captions")
        return CaptionedImages(names, captions, lambda name: Path(name).read_bytes())

    @abstractmethod
    def _pairs(self) -> Iterator[tuple[Path, list[str]]]:
        """Paths and captions of the images, in the order of the file."""


class CocoCaptions(CaptionLayout):
    """COCO as distributed. The images of split val2017 are not those of the Karpathy test split."""

    tree: ClassVar[str] = "  annotations/captions_val2017.json\n  val2017/*.jpg"

    kind: Literal["coco_captions"]
    split: str = "val2017"

    def _pairs(self) -> Iterator[tuple[Path, list[str]]]:
        path = self.path("annotations", f"captions_{self.split}.json")
        stored = read_json(path)
        try:
            captions: dict[int, list[str]] = {image["id"]: [] for image in stored["images"]}
            if len(captions) < len(stored["images"]):
                twice = Counter(image["id"] for image in stored["images"]).most_common(1)[0][0]
                raise DataError(f"'{path}': two images have the id {twice}")
            for entry in stored["annotations"]:
                number, text = entry["image_id"], entry["caption"]
                where = f"'{path}': annotation {entry.get('id', 'without id')}"
                if number not in captions:
                    raise DataError(
                        f"{where} has image_id {number!r}, and none of the {len(captions)} entries "
                        "of images has this id"
                    )
                captions[number].append(_text(text, where))
            for image in stored["images"]:
                yield self.root / self.split / image["file_name"], captions[image["id"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path}' is no caption file of COCO: {_cause(error)}") from error


class KarpathyCaptions(CaptionLayout):
    """The splits of Karpathy and Fei-Fei (2015), as JSON or as the CSV made from it.

    Attributes:
        captions: the file, `dataset_flickr30k.json` or `dataset_coco.json`, or a CSV with the
            columns filename, split and raw (a list in JSON).
        images: the folder of the images; for `dataset_coco.json` the one with `val2014`.
        split: of the images.
    """

    tree: ClassVar[str] = (
        "  dataset_flickr30k.json or flickr_annotations_30k.csv\n  flickr30k-images/*.jpg"
    )

    kind: Literal["karpathy_captions"]
    captions: str = "dataset_flickr30k.json"
    images: str = "flickr30k-images"
    split: str = "test"

    def _pairs(self) -> Iterator[tuple[Path, list[str]]]:
        path, folder = self.path(self.captions), self.path(self.images)
        table = path.suffix.lower() == ".csv"
        try:
            entries = _read_csv(path) if table else read_json(path)["images"]
            for entry in entries:
                if entry["split"] == self.split:
                    where = f"'{path}': {entry['filename']!r}"
                    texts = [_text(sentence["raw"], where) for sentence in entry["sentences"]]
                    yield folder / entry.get("filepath", "") / entry["filename"], texts
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"'{path}' does not have the Karpathy format: {_cause(error)}"
            ) from error


CaptionData = Annotated[CocoCaptions | KarpathyCaptions, Field(discriminator="kind")]


def _cause(error: Exception) -> str:
    return f"an entry lacks the key {error}" if isinstance(error, KeyError) else str(error)


def _text(caption: Any, where: str) -> str:
    if not isinstance(caption, str):
        raise DataError(f"{where}: expected a caption of text, got {caption!r}")
    return caption.strip()


def _readable(text: str) -> str:
    """The text with halves of characters, which no tokenizer takes, replaced."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows in the format of the JSON's entries."""
    header, *lines = read_csv(path) or [[]]
    columns = {"filename", "split", "raw"}
    if lines and not columns <= set(header):
        raise DataError(
            f"'{path}' needs the columns {', '.join(sorted(columns))}; it has {', '.join(header)}"
        )
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise DataError(
                f"'{path}', row {number}: expected {len(header)} columns, got {len(line)}"
            )
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    try:
        return [
            {**row, "sentences": [{"raw": text} for text in json.loads(row["raw"])]} for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise DataError(f"'{path}': expected lists in JSON in the column raw: {error}") from error
