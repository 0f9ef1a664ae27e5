"""Training images of the small teachers, as uint8 tensors in memory."""

import csv
import io
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PHOTO_SIDE = 128
CROPS_PER_PHOTO = 6


class Labelled(NamedTuple):
    """Images (N, 3, H, W) uint8 and their classes (N,) int64."""

    images: Tensor
    labels: Tensor


def load_class_names(data: Path) -> dict[str, str]:
    """WordNet id to comma-separated names, in the order of the class numbers."""
    with (data / "tiny-imagenet" / "classes.tsv").open() as table:
        return {row["wnid"]: row["name"] for row in csv.DictReader(table, delimiter="\t")}


def _decode(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _stack(pictures: list[Image.Image]) -> Tensor:
    array = np.stack([np.asarray(p) for p in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def load_tiny_imagenet(data: Path) -> tuple[Labelled, Labelled]:
    """Training and validation images, 64 x 64, sorted by name."""
    classes = {wnid: i for i, wnid in enumerate(load_class_names(data))}
    pictures: dict[str, list[Image.Image]] = {"train": [], "val": []}
    labels: dict[str, list[int]] = {"train": [], "val": []}
    with zipfile.ZipFile(data / "tiny-imagenet" / "tiny-imagenet-180.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".JPEG")):
            split, wnid, _ = name.split("/")
            pictures[split].append(_decode(archive.read(name)))
            labels[split].append(classes[wnid])
    train, val = (Labelled(_stack(pictures[s]), torch.tensor(labels[s])) for s in ("train", "val"))
    return train, val


def load_photo_crops(data: Path, seed: int = 0) -> Tensor:
    """Random square crops (M, 3, 128, 128) uint8 of larger photographs, without labels.

    Tiny ImageNet is blurred at 128 px; these crops add sharp images and parts of objects.
    """
    rng = np.random.default_rng(seed)
    contents = [path.read_bytes() for path in sorted((data / "det200/train").rglob("*.jp*g"))]
    for shard in sorted((data / "photos").glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".jpg")]
            contents += [file.read() for file in files if file is not None]
    crops = []
    for picture in map(_decode, contents):
        width, height = picture.size
        for _ in range(CROPS_PER_PHOTO):
            side = min(width, height) * rng.uniform(0.55, 1.0)
            left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
            crops.append(
                picture.resize(
                    (PHOTO_SIDE, PHOTO_SIDE),
                    Image.Resampling.BICUBIC,
                    box=(left, top, left + side, top + side),
                )
            )
    return _stack(crops)
