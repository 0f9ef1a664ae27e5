"""Writes freely licensed photographs for the quickstart: `python -m data.photographs OUT`.

They are files of scikit-image and scikit-learn, so nothing is downloaded: only those whose licence
the packages state as public domain, CC0 or CC BY, hence not `coins`, `ihc` ("no known
restrictions"), `moon` and the motorcycles (no licence). Exit codes: 0 success, 2 user error.
"""

import argparse
import csv
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.errors import DataError
from data.text import print_anything, printable

SIDE = 512  # largest side of a crop in pixels; smaller crops are not enlarged

_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


class Photograph(NamedTuple):
    """One photograph, its file and its licence.

    Attributes:
        library: import name of the package that contains it, `skimage` or `sklearn`.
        file: its name there.
        title: what it shows.
        author: who made it.
        licence: as the package states it.
        source: its origin, as the package states it.
        scales: sides of the square crops, as fractions of the shorter side; empty if held out.
    """

    library: str
    file: str
    title: str
    author: str
    licence: str
    source: str
    scales: tuple[float, ...]


def _read_table() -> Iterator[Photograph]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            scales = tuple(map(float, row.pop("scales").split()))
            yield Photograph(**row, scales=scales)


# Licences and authors: skimage/data/_fetchers.py and sklearn/datasets/images/README.txt. The latter
# lists one author twice; the URL of the flower shows who took it.
PHOTOGRAPHS = tuple(_read_table())


def windows(width: int, height: int, scales: tuple[float, ...]) -> list[tuple[int, int, int, int]]:
    """Square windows (left, top, right, bottom) at both ends of each axis, or one that fills it.

    Args:
        width: of the photograph, in pixels.
        height: likewise.
        scales: sides as fractions of the shorter side, in (0, 1].
    """
    boxes = []
    for scale in scales:
        side = round(scale * min(width, height))
        for top in sorted({0, height - side}):
            boxes += [(x, top, x + side, top + side) for x in sorted({0, width - side})]
    return boxes


def write_photographs(out: Path) -> tuple[int, int]:
    """Writes `photographs/`, `held-out/` and `LICENCES.md`; overwrites earlier files.

    Returns:
        Number of crops and of held-out photographs.

    Raises:
        DataError: a package or one of its photographs is missing, or the folder cannot be written.
    """
    originals = [(photograph, photograph_path(photograph)) for photograph in PHOTOGRAPHS]
    crops = held_out = 0
    try:
        for folder in ("photographs", "held-out"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for photograph, path in originals:
            if photograph.scales:
                crops += _write_crops(photograph, path, out / "photographs")
            else:
                shutil.copyfile(path, out / "held-out" / photograph.file)
                held_out += 1
        (out / "LICENCES.md").write_text(_licences(), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror})") from None
    return crops, held_out


def photograph_path(photograph: Photograph) -> Path:
    """The path of a photograph in its installed package.

    Raises:
        DataError: the package is not installed, or does not contain it.
    """
    spec = importlib.util.find_spec(photograph.library)
    if spec is None or spec.origin is None:
        raise DataError(
            f"the photographs come with {_PACKAGES[photograph.library]}, which is not installed; "
            "run `pip install scikit-image scikit-learn`"
        )
    path = Path(spec.origin).parent / _FOLDERS[photograph.library] / photograph.file
    if not path.is_file():
        raise DataError(
            f"{path}: this version of {_PACKAGES[photograph.library]} does not contain the "
            "photograph; constraints.txt has a version that does"
        )
    return path


def _write_crops(photograph: Photograph, path: Path, folder: Path) -> int:
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    boxes = windows(*pixels.size, photograph.scales)
    for number, box in enumerate(boxes):
        crop = pixels.crop(box)
        if crop.width > SIDE:
            crop = crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        crop.save(folder / f"{path.stem}_{number}.jpg", quality=95)
    return len(boxes)


def _licences() -> str:
    lines = [
        "# Photographs and their licences",
        "",
        "Taken from the packages scikit-image and scikit-learn. Those under photographs/ were",
        f"cropped, and shrunk to {SIDE} px where larger; those under held-out/ are unchanged.",
        "",
        "| file | shows | author | licence | source |",
        "|---|---|---|---|---|",
    ]
    for p in PHOTOGRAPHS:
        file = f"photographs/{Path(p.file).stem}_*.jpg" if p.scales else f"held-out/{p.file}"
        lines.append(f"| {file} | {p.title} | {p.author} | {p.licence} | {p.source} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m data.photographs",
        description="Write the quickstart's photographs: crops for training, three uncropped ones "
        "for evaluation, and their licences.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    print_anything()
    out = parser.parse_args().out
    try:
        crops, held_out = write_photographs(out)
    except DataError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    line = f"{crops} crops in {out}/photographs, {held_out} photographs in {out}/held-out"
    print(printable(line))


if __name__ == "__main__":
    main()
