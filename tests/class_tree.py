"""A tiny classification set on disk: noisy colours, a folder a class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 190), "green": (60, 180, 70), "red": (200, 50, 50)}


def write_colours(root: Path, *, train: int = 5, test: int = 3, side: int = 16) -> Path:
    """Images of `side` x `side` px; one of each split is wider, and one grey."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                width = side + 7 * (number == 0 and name == "red")
                noise = rng.normal(0, 45, (side, width, 3))
                pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels)
                if (name, number) == ("blue", 1):
                    image = image.convert("L")
                image.save(folder / f"{number}.png")
    return root
