"""Small labelled sets with one thing wrong, for the tests of surveys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLITS = {"train": "training", "test": "validation"}


def write_labels(
    root: Path, labels: dict[str, Sequence[np.ndarray]], suffix: str = "png"
) -> dict[str, Any]:
    """Images and label maps of both splits in ADE20K's folders; returns the dataset's entry."""
    for split, maps in labels.items():
        for kind in ("images", "annotations"):
            (root / kind / SPLITS[split]).mkdir(parents=True, exist_ok=True)
        for number, values in enumerate(maps):
            image = np.full((*values.shape[:2], 3), 40 * number, np.uint8)
            Image.fromarray(image).save(root / f"images/{SPLITS[split]}/{split}{number}.png")
            name = root / f"annotations/{SPLITS[split]}/{split}{number}.{suffix}"
            Image.fromarray(values).save(name)
    return {"kind": "folder", "root": str(root)}


def halves(left: Any, right: Any) -> np.ndarray:
    """A label map (8, 8) of two values, or (8, 8, 3) of two colours."""
    first, second = np.array(left, np.uint8), np.array(right, np.uint8)
    found = np.empty((8, 8, *first.shape), np.uint8)
    found[:, :4], found[:, 4:] = first, second
    return found


def write_depth(
    root: Path, train: Sequence[np.ndarray], test: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Images with depth, as PNG of integers or `.npy` of floats; returns the dataset's entry."""
    for split, maps in (("train", train), ("test", train if test is None else test)):
        for kind in ("rgb", "depth"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        for number, values in enumerate(maps):
            image = np.full((*values.shape, 3), 40 * number, np.uint8)
            Image.fromarray(image).save(root / split / "rgb" / f"{number}.png")
            if np.issubdtype(values.dtype, np.integer):
                Image.fromarray(values).save(root / split / "depth" / f"{number}.png")
            else:
                np.save(root / split / "depth" / f"{number}.npy", values)
    return {"kind": "folder", "root": str(root)}


def metres(low: float = 0.7, high: float = 9.0) -> np.ndarray:
    """Depth (12, 16) in metres."""
    return np.linspace(low, high, 12 * 16).reshape(12, 16)
