"""Loads all images of folders or archives into one tensor, for evaluation and pictures."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data.config import MAX_PIXELS
from data.decode import BadImage, ImageReader, choose_decoder
from data.errors import DataError
from data.gather import ImageFiles, open_images
from data.image_files import (
    IMAGE_EXTENSIONS,
    IMAGES,
    describe_left_out,
    extension_of,
    report_left_out,
)
from data.manifest import load_manifest
from data.shards import is_tar, tar_files
from data.tar_scan import split_name
from data.text import shown


def load_images(
    source: Path | Sequence[Path], resolution: tuple[int, int]
) -> tuple[torch.Tensor, list[str]]:
    """Reads every image, resized with antialiasing to cover the resolution and centre cropped.

    Args:
        source: folders of images (however deep), folders of shards, tars, zips or single images.
        resolution: (H, W) of the output in pixels.

    Returns:
        The images, uint8 (N, 3, H, W), in the order of the sources and sorted by name within each;
        and their names, `folder/image.jpg`, or `000000.tar/key.jpg` inside an archive.

    Raises:
        DataError: there is no image, or an image cannot be read.
    """
    reader = ImageReader("none", decoder=choose_decoder("auto"), draft=False, max_pixels=MAX_PIXELS)
    names, images = [], []
    left_out: list[str] = []
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    for path in paths:
        for name, place, data in _files(Path(path), left_out):
            try:
                pixels = reader.read(data, resolution)
            except BadImage as error:
                raise DataError(f"the image '{shown(place)}': {error}") from error
            names.append(name)
            images.append(torch.tensor(pixels).permute(2, 0, 1))
    if not images:
        others = f"; there are {describe_left_out(left_out)}" if left_out else ""
        raise DataError(f"no image ({IMAGES}) in {', '.join(map(shown, paths))}{others}")
    return torch.stack(images), names


def _files(path: Path, left_out: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yields the name, the full path and the bytes of every image file; notes the others."""
    if path.is_file() and extension_of(path.name) in IMAGE_EXTENSIONS:
        yield path.name, str(path), path.read_bytes()
        return
    shards = tar_files(path) if path.is_dir() else []
    if shards:
        load_manifest(path)  # raises where shards are still being written
        with open_images(path) as loose:
            for name in loose.sizes:
                raise DataError(
                    f"'{shown(path)}' holds shards and images ('{shown(name)}'); give one of them"
                )
    for archive in shards or [path]:
        with open_images(archive) as files:
            prefix = "" if archive.is_dir() else f"{archive.name}/"
            names = list(files.readable(archive).sizes)
            parts = _parts_of_samples(names) if is_tar(archive) else set()
            report_left_out(archive, sorted(parts))
            left_out += [*files.left_out, *parts]
            for name in names:
                if name not in parts:
                    place = f"{archive}/{name}"
                    yield prefix + name, place, _read(files, name, place)


def _read(files: ImageFiles, name: str, place: str) -> bytes:
    try:
        return files.read(name)
    except (BadImage, OSError) as error:
        raise DataError(f"the image '{shown(place)}': {error}") from error


def _parts_of_samples(names: Sequence[str]) -> set[str]:
    """Of a shard, pictures that belong to a sample with an image: `a.seg.png` beside `a.jpg`."""
    split = {name: split_name(name) for name in names}
    keys = {found[0] for found in split.values() if found and found[1] in IMAGE_EXTENSIONS}
    return {
        name
        for name, found in split.items()
        if found and found[0] in keys and found[1] not in IMAGE_EXTENSIONS
    }
