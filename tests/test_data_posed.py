"""Frames with depth and pose, read from tiny trees of each layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.posed import NaviPairs, ScanNet, SevenScenes

TURNED = np.array([[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]], dtype=float)


def write_colours(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 128, dtype=np.uint8)).save(path)


def write_depth(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint16)).save(path)


def write_seven_scenes(root: Path, count: int = 3) -> None:
    for number in range(count):
        stem = root / "kitchen" / "seq-01" / f"frame-{number:06d}"
        write_colours(stem.with_suffix(".color.png"), 8, 12)
        write_depth(stem.with_suffix(".depth.png"), np.array([[0, 65535, 1500]] * 2))
        pose = TURNED.copy()
        pose[0, 3] = number
        np.savetxt(stem.with_suffix(".pose.txt"), pose)


def test_seven_scenes_pairs_all_frames_of_a_sequence(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path)
    pairs = SevenScenes(kind="seven_scenes", root=tmp_path).pairs()
    assert [(a.pose[0, 3], b.pose[0, 3]) for a, b in pairs] == [(0, 1), (0, 2), (1, 2)]
    assert len(SevenScenes(kind="seven_scenes", root=tmp_path, every=2).pairs()) == 1
    near = SevenScenes(kind="seven_scenes", root=tmp_path, max_gap=1).pairs()
    assert [(a.pose[0, 3], b.pose[0, 3]) for a, b in near] == [(0, 1), (1, 2)]


def test_a_frame_has_metres_and_none_where_nothing_was_measured(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path)
    layout = SevenScenes(kind="seven_scenes", root=tmp_path)
    frame = layout.load(layout.pairs()[0][1])
    assert frame.depth.tolist() == [[0, 0, 1.5]] * 2
    assert frame.image.shape == (2, 3, 3)  # as large as its depth map
    assert frame.intrinsics.tolist() == [[585, 0, 1.5], [0, 585, 1], [0, 0, 1]]


def test_seven_scenes_that_is_not_there_shows_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\*/frame-\*.pose.txt in(.|\n)*camera to world"):
        SevenScenes(kind="seven_scenes", root=tmp_path).pairs()


def test_a_frame_without_depth_is_named(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path)
    (tmp_path / "kitchen" / "seq-01" / "frame-000001.depth.png").unlink()
    with pytest.raises(DataError, match=r"there is no .*frame-000001.depth.png"):
        SevenScenes(kind="seven_scenes", root=tmp_path).pairs()


def test_a_pose_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_seven_scenes(tmp_path)
    np.savetxt(tmp_path / "kitchen" / "seq-01" / "frame-000001.pose.txt", np.eye(3))
    with pytest.raises(DataError, match=r"frame-000001.pose.txt': expected a 4 x 4 matrix"):
        SevenScenes(kind="seven_scenes", root=tmp_path).pairs()


def write_scannet(root: Path) -> np.ndarray:
    scene = root / "scene0707_00"
    for number in (15, 585):
        write_colours(scene / "color" / f"{number}.jpg", 8, 12)
        write_depth(scene / "depth" / f"{number}.png", np.full((4, 6), 2000))
        (scene / "pose").mkdir(exist_ok=True)
        np.savetxt(scene / "pose" / f"{number}.txt", TURNED)
    intrinsics = np.array([[5.0, 0, 3], [0, 6, 2], [0, 0, 1]])
    np.savez(root / "test.npz", name=np.array([[707, 0, 15, 585]]))
    np.savez(root / "intrinsics.npz", scene0707_00=intrinsics)
    return intrinsics


def test_scannet_has_the_pairs_of_its_list(tmp_path: Path) -> None:
    intrinsics = write_scannet(tmp_path)
    layout = ScanNet(kind="scannet", root=tmp_path)
    ((first, second),) = layout.pairs()
    assert (first.image.name, second.image.name) == ("15.jpg", "585.jpg")
    frame = layout.load(first)
    assert (frame.depth == 2).all()
    assert np.array_equal(frame.intrinsics, intrinsics)
    assert np.array_equal(frame.pose, TURNED)


def test_scannet_that_is_not_there_shows_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*test.npz; expected(.|\n)*intrinsics.npz"):
        ScanNet(kind="scannet", root=tmp_path).pairs()


def test_scannet_lists_without_what_is_due_are_refused(tmp_path: Path) -> None:
    write_scannet(tmp_path)
    np.savez(tmp_path / "intrinsics.npz", other=np.eye(3))
    with pytest.raises(DataError, match=r"intrinsics.npz has no scene0707_00"):
        ScanNet(kind="scannet", root=tmp_path).pairs()
    np.savez(tmp_path / "test.npz", names=np.eye(4))
    with pytest.raises(DataError, match=r"test.npz has no `name`"):
        ScanNet(kind="scannet", root=tmp_path).pairs()


def write_navi(root: Path, shrunk: int = 1) -> None:
    """Two views of a square of 4 x 4 px at 500 mm, in frames of 20 x 30."""
    scene, prefix = root / "toy" / "multiview_00_pixel", "downsampled_" if shrunk > 1 else ""
    values = np.zeros((20, 30))
    values[8:12, 6:10] = 500
    for number in range(2):
        write_colours(scene / f"{prefix}images" / f"{number:03d}.jpg", 20, 30)
        write_depth(scene / f"{prefix}depth" / f"{number:03d}.png", values)
    half = np.sqrt(0.5)
    camera = {"q": [half, 0, 0, half], "t": [100, 0, 500], "focal_length": 40.0 * shrunk}
    size = [20 * shrunk, 30 * shrunk]
    facts = [{"filename": f"{n:03d}.jpg", "image_size": size, "camera": camera} for n in range(2)]
    (scene / "annotations.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("shrunk", [1, 2])
def test_navi_frames_are_squares_around_the_object(tmp_path: Path, shrunk: int) -> None:
    write_navi(tmp_path, shrunk)
    layout = NaviPairs(kind="navi", root=tmp_path, size_px=10, downsampled=shrunk > 1)
    ((view, _),) = layout.pairs()
    frame = layout.load(view)
    assert frame.image.shape == (10, 10, 3)
    # Five pixels of the frame, from (5, 7) on, became ten.
    assert np.allclose(frame.intrinsics, [[80, 0, 20], [0, 80, 6], [0, 0, 1]])
    assert (frame.depth > 0).sum() == 8 * 8
    assert frame.depth.max() == pytest.approx(0.5)


def test_navi_poses_go_from_camera_to_object_in_metres(tmp_path: Path) -> None:
    write_navi(tmp_path)
    ((view, _),) = NaviPairs(kind="navi", root=tmp_path).pairs()
    # A quarter turn about z takes the object's x to the camera's y.
    to_camera = np.linalg.inv(view.pose)
    assert np.allclose(to_camera @ [1, 0, 0, 1], [0.1, 1, 0.5, 1])


def test_navi_that_is_not_there_shows_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations.json in(.|\n)*uint16, 0 off the object"):
        NaviPairs(kind="navi", root=tmp_path).pairs()


def test_navi_scenes_without_what_is_due_are_refused(tmp_path: Path) -> None:
    write_navi(tmp_path)
    write_depth(tmp_path / "toy/multiview_00_pixel/depth/000.png", np.zeros((20, 30)))
    layout = NaviPairs(kind="navi", root=tmp_path)
    with pytest.raises(DataError, match=r"000.png' has no pixel of the object"):
        layout.load(layout.pairs()[0][0])
    (tmp_path / "toy/multiview_00_pixel/annotations.json").write_text('[{"filename": "0.jpg"}]')
    with pytest.raises(DataError, match=r"annotations.json': KeyError: 'camera'"):
        layout.pairs()
