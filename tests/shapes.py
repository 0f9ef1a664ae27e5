"""An easy detection set in COCO's layout: coloured squares and discs on grey."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("square", "disc")


def write_shapes(root: Path, num_train: int, num_test: int, side: int = 96) -> Path:
    """Writes both splits; images are `side` wide and three quarters as high; returns the root."""
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for name, count in (("train2017", num_train), ("val2017", num_test)):
        (root / name).mkdir()
        tree: dict[str, Any] = {
            "images": [],
            "annotations": [],
            # As in COCO, numbers of categories have gaps.
            "categories": [{"id": 3, "name": CLASSES[0]}, {"id": 7, "name": CLASSES[1]}],
        }
        for number in range(1, count + 1):
            _add_image(tree, root / name, number, side, generator)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(tree))
    return root


def _add_image(
    tree: dict[str, Any], folder: Path, number: int, side: int, generator: np.random.Generator
) -> None:
    height = side * 3 // 4
    pixels = np.full((height, side, 3), 110, np.uint8)
    y, x = np.mgrid[:height, :side] + 0.5
    for half in range(2):  # one shape in each half, so that none hides another
        size = int(generator.integers(side // 5, side // 3))
        left = half * side // 2 + int(generator.integers(0, side // 2 - size))
        top = int(generator.integers(0, height - size))
        disc = bool(generator.integers(2))
        inside = (x > left) & (x < left + size) & (y > top) & (y < top + size)
        if disc:
            r = size / 2
            inside &= (x - left - r) ** 2 + (y - top - r) ** 2 < r**2
        pixels[inside] = (230, 40, 40) if disc else (40, 60, 230)
        tree["annotations"].append(
            {
                "id": len(tree["annotations"]) + 1,
                "image_id": number,
                "category_id": 7 if disc else 3,
                "bbox": [left, top, size, size],
                "area": int(inside.sum()),
                "iscrowd": 0,
            }
        )
    file = f"{number:012d}.png"
    Image.fromarray(pixels).save(folder / file)
    tree["images"].append({"id": number, "file_name": file, "height": height, "width": side})
