"""Converts frames of NYUv2 in plain folders to the NYUDv2 layout that `kind: multitask` reads.

    python -m tests.quality.nyud_from_folders SOURCE OUT

SOURCE has {train,test}/{rgb/*.jpg,depth8/*.png,labels39/*.png}: depth up to 10 m in 8 bits, labels
0 to 38 with 255 for unknown. Normals are computed from depth, as in
`recipes/evaluation/normals_quick.yaml`; the white border of the frames is cropped.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.labelled.files import IGNORED, read_indices, read_rgb
from distill.benchmarks.dense.normal_scores import normal_colours, normals_of_depth

RIM = (slice(45, 471), slice(41, 601))
METRES = 10 / 255
FOCAL_PX = 518.8579
STEP = 20  # pixels to either side, because depth has steps of 4 cm


def write_frame(source: Path, out: Path, name: str) -> None:
    """Writes the image and the labels of all tasks of one frame.

    Args:
        source: the folder of the split.
        out: the root of the dataset to write.
        name: of the frame, without extension.
    """
    labels = read_indices(source / "labels39" / f"{name}.png")[RIM]
    depth = read_indices(source / "depth8" / f"{name}.png")[RIM] * METRES
    centre = (240 - RIM[0].start, 320 - RIM[1].start)
    normals = normals_of_depth(torch.tensor(depth), FOCAL_PX, centre, STEP)
    colours = (normal_colours(normals) * 255).round().byte().permute(1, 2, 0).numpy()
    pictures = {
        "images": read_rgb(source / "rgb" / f"{name}.jpg")[RIM],
        "segmentation": np.where(labels == IGNORED, 0, labels + 1).astype(np.uint8),
        "normals": colours,
    }
    for folder, values in pictures.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(out / folder / f"{name}.png")
    (out / "depth").mkdir(exist_ok=True)
    np.save(out / "depth" / f"{name}.npy", depth.astype(np.float32))


def main(source: Path, out: Path) -> None:
    """Writes both splits."""
    for split, listed in (("train", "train"), ("test", "val")):
        names = sorted(path.stem for path in (source / split / "rgb").glob("*.jpg"))
        for name in names:
            write_frame(source / split, out, name)
        (out / "gt_sets").mkdir(exist_ok=True)
        (out / "gt_sets" / f"{listed}.txt").write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
