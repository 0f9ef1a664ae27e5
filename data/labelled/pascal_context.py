"""Readers of the MATLAB files of Pascal Context (Mottaghi et al. 2014) and Pascal Part."""

from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.labelled.files import IGNORED
from data.labelled.segmentation_classes import PASCAL_VOC

# The numbers of PASCAL_VOC's classes, after the background, among Pascal Context's 459.
_VOC_NUMBERS = (
    *(2, 23, 25, 31, 34, 45, 59, 65, 72, 98),
    *(397, 113, 207, 258, 284, 308, 347, 368, 416, 427),
)
_PERSON = PASCAL_VOC.index("person")
_CONTEXT_CLASSES = 459

# The six groups of Chen et al. (arXiv 1511.03339), by the names of Pascal Part (Chen et al. 2014).
_PARTS = {
    "head": "head leye reye lear rear lebrow rebrow nose mouth hair",
    "torso": "torso neck",
    "upper arms": "luarm ruarm",
    "lower arms": "llarm rlarm lhand rhand",
    "upper legs": "luleg ruleg",
    "lower legs": "llleg rlleg lfoot rfoot",
}
PART_CLASSES = ("background", *_PARTS)
_PART_NUMBER = {
    name: number for number, names in enumerate(_PARTS.values(), 1) for name in names.split()
}


def read_voc_classes(path: Path) -> np.ndarray:
    """Pascal VOC's classes from a map of 459 classes, uint8 (H, W).

    Other classes become background; pixels without a label are ignored.

    Raises:
        DataError: the file is no such map.
    """
    labels = np.asarray(_read_mat(path, "LabelMap"))
    if labels.ndim != 2 or labels.size == 0 or not _are_numbers(labels):
        raise DataError(f"'{path}': expected a LabelMap of classes 0 to {_CONTEXT_CLASSES}")
    table = np.zeros(_CONTEXT_CLASSES + 1, np.uint8)
    table[0] = IGNORED
    table[list(_VOC_NUMBERS)] = range(1, len(PASCAL_VOC))
    return table[labels.astype(np.int64)]


def _are_numbers(labels: np.ndarray) -> bool:
    """Whether all are whole numbers of classes; not those that compare with nothing."""
    if labels.dtype.kind not in "uif":
        return False
    whole = labels.dtype.kind != "f" or bool((labels == np.round(labels)).all())
    return whole and labels.min() >= 0 and bool(labels.max() <= _CONTEXT_CLASSES)


def read_parts(path: Path | None, size: tuple[int, ...]) -> np.ndarray:
    """The parts of all people in an image, uint8 (H, W); later people cover earlier ones.

    An image in which no person has a part is ignored as a whole, as in all work on this set.

    Args:
        path: the image's annotation; None if it has none.
        size: (H, W) of the image in pixels.

    Raises:
        DataError: the file has no annotation of parts, or other sizes or parts.
    """
    out = np.zeros(size, np.uint8)
    for thing in [] if path is None else _listed(_read_mat(path, "anno")["objects"]):
        if int(thing["class_ind"]) != _PERSON:
            continue
        for part in _listed(thing["parts"]):
            mask, name = np.asarray(part["mask"]).astype(bool), str(part["part_name"])
            if name not in _PART_NUMBER or mask.shape != size:
                raise DataError(
                    f"'{path}': expected parts of a person in an image of {size} px, got "
                    f"{name!r} of {mask.shape} px"
                )
            out[mask] = _PART_NUMBER[name]
    return out if out.any() else np.full(size, IGNORED, np.uint8)


def _read_mat(path: Path, key: str) -> Any:
    from scipy.io import loadmat

    try:
        return loadmat(path, simplify_cells=True)[key]
    except KeyError:
        raise DataError(f"'{path}' has no {key}") from None
    except Exception as error:  # scipy raises exceptions of many types
        raise DataError(f"'{path}' is no readable .mat file: {error}") from error


def _listed(entries: Any) -> list[Any]:
    """A MATLAB array of structures as a list: scipy unpacks arrays of one structure."""
    return [entries] if isinstance(entries, dict) else list(entries)
