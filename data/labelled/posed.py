"""Frames with depth, intrinsics and pose, in pairs: 7-Scenes, ScanNet, NAVI."""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt

from data.errors import DataError
from data.image_files import warn_once
from data.labelled.files import naming, read_json, read_lines, read_rgb, read_size
from data.labelled.layout import Layout
from data.labelled.pixel_values import read_steps
from data.text import shown

_UNKNOWN = 65535  # in 16-bit depth maps where nothing was measured, like 0


@dataclass(frozen=True, eq=False)
class FrameFiles:
    """The files of a frame, and its camera.

    Attributes:
        image: file of the image.
        depth: file of the depth map.
        pose: (4, 4) from the camera (x right, y down, z ahead) to the world, in metres.
        focal_px: focal length of both axes, or (3, 3) intrinsics, in pixels of the depth map.
    """

    image: Path
    depth: Path
    pose: np.ndarray
    focal_px: float | np.ndarray


class Frame(NamedTuple):
    """A frame.

    Attributes:
        image: (H, W, 3) uint8.
        depth: (H, W) in metres along the camera's axis, 0 where unknown.
        intrinsics: (3, 3); the centre of the first pixel is (0.5, 0.5).
        pose: (4, 4) from the camera to the world, in metres.
    """

    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    pose: np.ndarray


class PosedLayout(Layout):
    """A set of posed frames."""

    @abstractmethod
    def pairs(self) -> list[tuple[FrameFiles, FrameFiles]]:
        """All pairs that may be matched.

        Raises:
            DataError: files are missing.
        """

    def load(self, files: FrameFiles) -> Frame:
        """Reads a frame; the image is resized to the size of the depth map.

        Raises:
            DataError: a file cannot be read.
        """
        raw = _read_steps(files.depth)
        depth = np.where(raw == _UNKNOWN, 0, raw) / 1000
        image = Image.fromarray(read_rgb(files.image))
        height, width = depth.shape
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return Frame(
            np.asarray(image), depth, _intrinsics(files.focal_px, height, width), files.pose
        )


class SevenScenes(PosedLayout):
    """7-Scenes, and folders in that format; the frames of a sequence are matched with each other.

    Attributes:
        every: use only every n-th of a sequence's sorted frames.
        max_gap: largest distance, in used frames, between the two of a pair; None for all pairs.
        focal_px: focal length in pixels; the set does not have it, its authors suggest 585.
    """

    tree: ClassVar[str] = (
        "  <any folders, such as kitchen/seq-01>/frame-*.color.png (or jpg)\n"
        "  .../frame-*.depth.png   uint16 millimetres, 0 or 65535 where unknown\n"
        "  .../frame-*.pose.txt    4 x 4, camera to world, metres"
    )

    kind: Literal["seven_scenes"]
    every: PositiveInt = 1
    max_gap: PositiveInt | None = None
    focal_px: PositiveFloat = 585.0

    def pairs(self) -> list[tuple[FrameFiles, FrameFiles]]:
        """All pairs inside the sequences; see `PosedLayout.pairs`."""
        sequences: dict[Path, list[Path]] = {}
        for path in self.glob("**/frame-*.pose.txt"):
            sequences.setdefault(path.parent, []).append(path)
        self._report_unposed({pose for poses in sequences.values() for pose in poses})
        pairs = []
        for poses in sequences.values():
            views = [self._view(path) for path in poses[:: self.every]]
            for i, first in enumerate(views):
                last = len(views) if self.max_gap is None else i + 1 + self.max_gap
                pairs += [(first, second) for second in views[i + 1 : last]]
        return pairs

    def _report_unposed(self, poses: set[Path]) -> None:
        found = sorted(self.root.glob("**/frame-*.color.*"))
        alone = [p for p in found if p.with_suffix("").with_suffix(".pose.txt") not in poses]
        if alone:
            first = shown(alone[0].relative_to(self.root))
            warn_once(self.root, f"left out {len(alone)} frames without a pose, such as {first}")

    def _view(self, pose: Path) -> FrameFiles:
        stem = pose.name.removesuffix(".pose.txt")
        colours = [pose.with_name(f"{stem}.color.{kind}") for kind in ("png", "jpg", "jpeg")]
        found = [path for path in colours if path.is_file()]
        if len(found) > 1:
            raise DataError(
                f"'{shown(pose.parent)}' has both '{shown(found[0].name)}' and "
                f"'{shown(found[1].name)}'; remove one of them"
            )
        image = found[0] if found else self.path(str(colours[0].relative_to(self.root)))
        depth = self.path(str(pose.with_name(f"{stem}.depth.png").relative_to(self.root)))
        return FrameFiles(image, depth, _pose(pose), self.focal_px)


class ScanNet(PosedLayout):
    """ScanNet's 1,500 test pairs, in the format that matching papers use."""

    tree: ClassVar[str] = (
        "  test.npz         `name`, (N, 4): scene, its scan, the two frames of a pair\n"
        "  intrinsics.npz   scene0707_00, ...: 3 x 3 at the depth maps' size\n"
        "  scene0707_00/{color/*.jpg,depth/*.png,pose/*.txt}   uint16 millimetres; camera to world"
    )

    kind: Literal["scannet"]

    def pairs(self) -> list[tuple[FrameFiles, FrameFiles]]:
        """The pairs of the list; see `PosedLayout.pairs`."""
        names = _load_npz(self.path("test.npz"))
        intrinsics = _load_npz(self.path("intrinsics.npz"))
        if "name" not in names:
            raise DataError(f"{self.root / 'test.npz'} has no `name`; expected:\n{self.tree}")
        listed = names["name"]
        if listed.dtype.kind not in "iu" or listed.ndim != 2 or listed.shape[1] != 4:
            raise DataError(
                f"{self.root / 'test.npz'}: `name`: expected whole numbers (N, 4), got "
                f"{listed.dtype} {listed.shape}; expected:\n{self.tree}"
            )
        pairs = []
        for scene, scan, first, second in listed.tolist():
            folder = f"scene{scene:04d}_{scan:02d}"
            if folder not in intrinsics:
                raise DataError(f"{self.root / 'intrinsics.npz'} has no {folder}")
            matrix = intrinsics[folder]
            if matrix.dtype.kind not in "iuf" or matrix.size != 9 or not np.isfinite(matrix).all():
                raise DataError(
                    f"{self.root / 'intrinsics.npz'}: {folder}: expected 3 x 3 finite numbers, got "
                    f"{matrix.dtype} {matrix.shape}"
                )
            views = [self._view(folder, n, intrinsics[folder]) for n in (first, second)]
            pairs.append((views[0], views[1]))
        return pairs

    def _view(self, scene: str, number: int, intrinsics: np.ndarray) -> FrameFiles:
        return FrameFiles(
            self.path(scene, "color", f"{number}.jpg"),
            self.path(scene, "depth", f"{number}.png"),
            _pose(self.path(scene, "pose", f"{number}.txt")),
            intrinsics.astype(np.float64).reshape(3, 3),
        )


class NaviPairs(PosedLayout):
    """NAVI (arXiv 2306.09109): several views of one object, with depth on the object only.

    Frames are cropped to a square around the object. The protocol's `pose_residual_m` is of
    millimetres if all units are correct.

    Attributes:
        size_px: side that crops are resized to.
        depth_unit_m: metres of one step of the stored depth.
        translation_unit_m: metres of one unit of the cameras' translations.
        downsampled: whether to read `downsampled_images` and `downsampled_depth`.
    """

    tree: ClassVar[str] = (
        "  <object>/multiview_*/images/*.jpg\n"
        "  <object>/multiview_*/depth/*.png       uint16, 0 off the object\n"
        "  <object>/multiview_*/annotations.json  a list of filename, image_size, and camera:\n"
        "                                         q (w, x, y, z) and t from object to camera,\n"
        "                                         focal_length in px"
    )

    kind: Literal["navi"]
    size_px: PositiveInt = 512
    depth_unit_m: PositiveFloat = 0.001
    translation_unit_m: PositiveFloat = 0.001
    downsampled: bool = False

    def pairs(self) -> list[tuple[FrameFiles, FrameFiles]]:
        """All pairs inside the multi-view scenes; see `PosedLayout.pairs`."""
        return [
            pair
            for path in self.glob("*/multiview_*/annotations.json")
            for pair in combinations(self._scene(path), 2)
        ]

    def load(self, files: FrameFiles) -> Frame:
        """Reads and crops a frame; see `PosedLayout.load`."""
        raw = _read_steps(files.depth).astype(np.float64)
        if not raw.any():
            raise DataError(f"the depth map '{files.depth}' has no pixel of the object")
        depth = raw * self.depth_unit_m
        image = Image.fromarray(read_rgb(files.image))
        image = image.resize(raw.shape[::-1], Image.Resampling.BILINEAR)
        box, side = _square(raw > 0), self.size_px
        intrinsics = _intrinsics(files.focal_px, *raw.shape)
        intrinsics[:2, 2] -= box[:2]
        intrinsics[:2] *= side / (box[2] - box[0])
        shape, smooth, nearest = (side, side), Image.Resampling.BILINEAR, Image.Resampling.NEAREST
        cropped = Image.fromarray(depth.astype(np.float32)).crop(box).resize(shape, nearest)
        colours = np.asarray(image.crop(box).resize(shape, smooth))
        return Frame(colours, np.asarray(cropped, dtype=np.float64), intrinsics, files.pose)

    def _scene(self, path: Path) -> list[FrameFiles]:
        try:
            return [self._view(path, facts) for facts in read_json(path)]
        except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the scene '{path}': {type(error).__name__}: {error}") from error

    def _view(self, path: Path, facts: dict[str, Any]) -> FrameFiles:
        scene, camera = str(path.parent.relative_to(self.root)), facts["camera"]
        to_camera = np.eye(4)
        to_camera[:3, :3] = _rotation(np.array(camera["q"], dtype=np.float64))
        to_camera[:3, 3] = np.array(camera["t"], dtype=np.float64) * self.translation_unit_m
        prefix = "downsampled_" if self.downsampled else ""
        depth = self.path(scene, f"{prefix}depth", f"{Path(facts['filename']).stem}.png")
        # Annotations are for the full size.
        shrunk = read_size(depth)[0] / facts["image_size"][0]
        return FrameFiles(
            self.path(scene, f"{prefix}images", facts["filename"]),
            depth,
            np.linalg.inv(to_camera),
            float(camera["focal_length"]) * shrunk,
        )


AnyPosed = Annotated[SevenScenes | ScanNet | NaviPairs, Field(discriminator="kind")]


def _intrinsics(focal_px: float | np.ndarray, height: int, width: int) -> np.ndarray:
    if isinstance(focal_px, np.ndarray):
        return focal_px
    return np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])


def _read_steps(path: Path) -> np.ndarray:
    """Depth as stored, (H, W) of whole numbers, 0 where negative.

    Raises:
        DataError: the file cannot be read, or has fractions, which are of another unit.
    """
    values = read_steps(path)
    if values.dtype.kind == "f" or values.dtype == np.uint8:  # 8 bits reach 0.255 m
        raise DataError(
            f"the depth '{shown(path)}': expected whole numbers of 16 bits, got {values.dtype}"
        )
    return values.clip(min=0)


def _pose(path: Path) -> np.ndarray:
    lines = read_lines(path)
    with naming(path, "pose"):
        pose = np.loadtxt(lines) if lines else np.empty(0)  # numpy would warn on its own
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise DataError(f"the pose '{path}': expected a 4 x 4 matrix of finite numbers")
    return pose


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with naming(path, "list"):
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise DataError(f"the list '{shown(path)}': expected an `.npz` of named arrays")
        with arrays:
            return dict(arrays)


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """The matrix (3, 3) of a quaternion (w, x, y, z) of any length."""
    w, *axis = quaternion / np.linalg.norm(quaternion)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _square(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The square (left, top, right, bottom) around a mask, a tenth larger; may exceed the image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] + 1 - top, columns[-1] + 1 - left
    side = int(np.ceil(1.1 * max(height, width)))
    left, top = int(left + (width - side) // 2), int(top + (height - side) // 2)
    return left, top, left + side, top + side
