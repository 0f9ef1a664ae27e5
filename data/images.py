"""Loads all images of folders or archives into one tensor, for evaluation and pictures."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from data.config import MAX_PIXELS
from data.decode import BadImage, ImageReader, choose_decoder
from data.errors import DataError
from data.gather import open_images
from data.manifest import load_manifest
from data.tar_scan import IMAGE_EXTENSIONS


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
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    for path in paths:
        for name, place, data in _files(Path(path)):
            try:
                pixels = reader.read(data, resolution)
            except BadImage as error:
                raise DataError(f"the image '{place}': {error}") from error
            names.append(name)
            images.append(torch.tensor(pixels).permute(2, 0, 1))
    if not images:
        raise DataError(f"no image (jpg, jpeg, png, webp) in {', '.join(map(str, paths))}")
    return torch.stack(images), names


def _files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields the name, the full path and the bytes of every image file."""
    if path.is_file() and path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS:
        yield path.name, str(path), path.read_bytes()
        return
    shards = sorted(path.glob("*.tar")) if path.is_dir() else []
    if shards:
        load_manifest(path)  # raises where shards are still being written
        with open_images(path) as loose:
            for name in loose.sizes:
                raise DataError(f"'{path}' holds shards and images ('{name}'); give one of them")
    for archive in shards or [path]:
        with open_images(archive) as files:
            prefix = "" if archive.is_dir() else f"{archive.name}/"
            for name in files.readable(archive).sizes:
                place = f"{archive}/{name}"
                try:
                    data = files.read(name)
                except (BadImage, OSError) as error:
                    raise DataError(f"the image '{place}': {error}") from error
                yield prefix + name, place, data
