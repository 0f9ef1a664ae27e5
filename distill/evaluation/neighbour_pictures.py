"""A sheet of test images with their nearest train images, framed green where the class is right."""

from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from data.labelled.class_folders import ClassImages
from data.labelled.prepared import ImagePreparation, PreparationConfig

_SIDE, _FRAME, _ROWS, _COLUMNS = 112, 4, 8, 5
_RIGHT, _WRONG = "#2a9d3a", "#c8372d"


def draw_neighbours(path: Path, test: ClassImages, train: ClassImages, index: Tensor) -> None:
    """Draws a few test images, spread over the classes, each followed by its nearest.

    Args:
        path: the PNG to write.
        test: what was classified; can be read.
        train: the bank; can be read.
        index: (Q, k) numbers of each test image's nearest in the bank, nearest first.
    """
    prepare = ImagePreparation(PreparationConfig(), (_SIDE, _SIDE), 1)

    def panel(images: ClassImages, number: int, colour: str) -> Image.Image:
        name = images.names[number]
        picture = Image.fromarray(prepare(images.read(name), name))
        return ImageOps.expand(picture, _FRAME, colour)

    rows, columns = min(_ROWS, len(index)), min(_COLUMNS, index.shape[1])
    step = _SIDE + 2 * _FRAME
    sheet = Image.new("RGB", ((1 + columns) * step, rows * step), "white")
    for row in range(rows):
        query = row * len(index) // rows
        sheet.paste(panel(test, query, "white"), (0, row * step))
        for column, number in enumerate(index[query, :columns].tolist()):
            right = train.labels[number] == test.labels[query]
            picture = panel(train, number, _RIGHT if right else _WRONG)
            sheet.paste(picture, ((1 + column) * step, row * step))
    sheet.save(path)
