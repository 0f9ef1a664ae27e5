"""Frames of NYUv2 in plain folders, brought to the form of NYUDv2 that `kind: multitask` reads.

    python -m tests.quality.nyud_from_folders SOURCE OUT

SOURCE has {train,test}/{rgb/*.jpg,depth8/*.png,labels39/*.png}: depth of 10 m in 8 bits, labels
of 0 to 38 with 255 where unknown. Normals are made of depth, as in
`recipes/evaluation/normals_quick.yaml`; the white rim of the frames is cut off.
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
STEP = 20  # pixels to either side: depth comes in steps of 4 cm


def write_frame(source: Path, out: Path, name: str) -> None:
    """Writes the image and the truth of all tasks of one frame.

    Args:
        source: the split's folder.
        out: the root of the set that is written.
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
    """Writes a set."""
    for split, listed in (("train", "train"), ("test", "val")):
        names = sorted(path.stem for path in (source / split / "rgb").glob("*.jpg"))
        for name in names:
            write_frame(source / split, out, name)
        (out / "gt_sets").mkdir(exist_ok=True)
        (out / "gt_sets" / f"{listed}.txt").write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
