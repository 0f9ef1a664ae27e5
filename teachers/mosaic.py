"""Several small images on one canvas, for an encoder that accepts one large size only.

SAM sees 1024 px: sixteen images of 256 px fill it, and one pass gives the maps of all sixteen
(RADIOv2.5, arXiv 2412.07679, section 4.2). The encoder's global attention mixes the images;
windowed attention does not where the tiles fit its windows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.teacher import Teacher
from teachers.upsamplers.resize import resize, scaled


@dataclass(frozen=True)
class Mosaic:
    """The layout of images on a canvas, in cells of the encoder's map; see `fit`.

    Attributes:
        canvas: (H, W) in pixels, the encoder's native resolution.
        patch: pixels of a cell.
        tile: (h, w) cells of one image.
        tiles: (rows, columns) of images.
        pitch: (h, w) cells from one image to the next; the rest stays empty.
    """

    canvas: tuple[int, int]
    patch: int
    tile: tuple[int, int]
    tiles: tuple[int, int]
    pitch: tuple[int, int]

    @classmethod
    def fit(cls, spec: FeatureSpec, grid: tuple[int, int]) -> Self:
        """As many images of `grid` (h, w) cells as the canvas holds, floor(G / g) per axis, evenly.

        Raises:
            TeacherError: fewer than two images fit into the encoder's canvas.
        """
        h, w = spec.grid(*spec.resolution)
        tiles = h // grid[0], w // grid[1]
        if tiles[0] * tiles[1] < 2:
            raise TeacherError(
                f"a mosaic: images of {grid[0]} x {grid[1]} cells on the encoder's grid of "
                f"{h} x {w} give {tiles[0]} x {tiles[1]} per canvas; at least two must fit"
            )
        if scaled((h, w), (spec.patch_size, spec.patch_size)) != spec.resolution:
            raise TeacherError(
                f"a mosaic: the encoder's {h} x {w} cells of {spec.patch_size} px do not fill its "
                f"{spec.resolution[0]} x {spec.resolution[1]} px"
            )
        pitch = h // tiles[0], w // tiles[1]
        return cls(spec.resolution, spec.patch_size, grid, tiles, pitch)

    @property
    def num_images(self) -> int:
        """Images per canvas."""
        return self.tiles[0] * self.tiles[1]

    def pack(self, images: Tensor, background: Tensor) -> Tensor:
        """Places images on canvases, the last of which may stay partly empty.

        Args:
            images: (B, 3, H, W), of any size; they are resized to their tile.
            background: (1, 3, 1, 1), the colour of the empty space.

        Returns:
            (ceil(B / num_images), 3, *canvas).
        """
        small = resize(images, scaled(self.tile, (self.patch, self.patch)))
        num = -(-len(images) // self.num_images)
        canvases = background.expand(num, -1, *self.canvas).clone()
        for number, image in enumerate(small):
            rows, columns = self._place(number, self.patch)
            canvases[number // self.num_images, :, rows, columns] = image
        return canvases

    def unpack(self, maps: Tensor, num: int) -> Tensor:
        """Cuts the maps (num, D, *tile) of `num` images out of the canvases', (N, D, h, w)."""
        cut = []
        for number in range(num):
            rows, columns = self._place(number, 1)
            cut.append(maps[number // self.num_images, :, rows, columns])
        return torch.stack(cut)

    def encode(self, teacher: Teacher, images: Tensor) -> Features:
        """Encodes images (B, 3, H, W) in [0, 1], one pass per canvas, without a summary."""
        canvases = self.pack(images, teacher.mean)  # zero after normalisation
        return Features(None, self.unpack(teacher(canvases).spatial, len(images)))

    def _place(self, number: int, unit: int) -> tuple[slice, slice]:
        row, column = divmod(number % self.num_images, self.tiles[1])
        top, left = row * self.pitch[0] * unit, column * self.pitch[1] * unit
        return (slice(top, top + self.tile[0] * unit), slice(left, left + self.tile[1] * unit))
