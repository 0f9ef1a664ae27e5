"""Depth sets: each layout on a tiny tree of its form, and what a user is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from data.errors import DataError
from data.labelled.depth import AnyDepth, DepthLayout
from data.labelled.depth_files import read_depth, read_normals
from data.labelled.depth_survey import DepthSurvey


def layout(root: Path, **value: Any) -> DepthLayout:
    parsed: DepthLayout = TypeAdapter(AnyDepth).validate_python({"root": root} | value)
    return parsed


def write_rgb(path: Path, height: int = 6, width: int = 8, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[..., 0] = np.arange(width)
    Image.fromarray(pixels).save(path)


def write_depth(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def millimetres(height: int = 6, width: int = 8) -> np.ndarray:
    return (1000 + np.arange(height * width).reshape(height, width)).astype(np.uint16)


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    for split, scene in (("train", "kitchen_0028b"), ("test", "bathroom")):
        write_rgb(tmp_path / scene / "rgb_00045.png")
        (tmp_path / scene / "rgb_00045.png").rename(tmp_path / scene / "rgb_00045.jpg")
        write_depth(tmp_path / scene / "sync_depth_00045.png", millimetres())
        line = f"/{scene}/rgb_00045.jpg /{scene}/sync_depth_00045.png 518.8579\n"
        (tmp_path / f"nyu_{split}.txt").write_text(line)
    return tmp_path


def test_nyuv2_is_read_by_its_lists_in_millimetres(nyu: Path) -> None:
    chosen = layout(nyu, kind="nyuv2")
    (train,), (test,) = chosen.samples("train"), chosen.samples("test")
    assert (train.key, test.key) == ("kitchen_0028b/rgb_00045", "bathroom/rgb_00045")
    view = chosen.read(test)
    assert view.image.shape == (6, 8, 3)
    assert view.depth.dtype == np.float32
    assert view.depth[5, 7] == pytest.approx(1.047)
    assert (view.focal_px, view.centre, view.normals) == (518.8579, (3, 4), None)


def test_nyuv2_may_have_its_test_images_elsewhere(nyu: Path) -> None:
    (nyu / "official_splits" / "test").mkdir(parents=True)
    (nyu / "bathroom").rename(nyu / "official_splits" / "test" / "bathroom")
    chosen = layout(nyu, kind="nyuv2", test_root="official_splits/test")
    assert chosen.read(chosen.samples("test")[0]).depth.shape == (6, 8)


@pytest.mark.parametrize("focal", ["nan", "-1", "0", "inf"])
def test_a_focal_length_of_nyuv2_that_cannot_be_is_named(nyu: Path, focal: str) -> None:
    (nyu / "nyu_test.txt").write_text(f"a.jpg b.png {focal}\n")
    with pytest.raises(DataError, match=f"RGB DEPTH FOCAL, got 'a.jpg b.png {focal}'"):
        layout(nyu, kind="nyuv2").samples("test")


def test_an_image_that_a_list_has_twice_is_refused(nyu: Path) -> None:
    DepthSurvey(layout(nyu, kind="nyuv2"), None)
    path = nyu / "nyu_test.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=r"test lists .*rgb_00045.jpg more than once \(1 images"):
        DepthSurvey(layout(nyu, kind="nyuv2"), None)


def test_a_line_of_nyuv2_that_is_none_is_named(nyu: Path) -> None:
    (nyu / "nyu_test.txt").write_text("a.jpg b.png\n")
    with pytest.raises(DataError, match="expected lines RGB DEPTH FOCAL, got 'a.jpg b.png'"):
        layout(nyu, kind="nyuv2").samples("test")


def folder(root: Path, **value: Any) -> DepthLayout:
    for split in ("train", "test"):
        write_rgb(root / split / "rgb" / "b.jpg")
        write_rgb(root / split / "rgb" / "a.png")
        write_depth(root / split / "depth8" / "a.png", np.full((6, 8), 51, np.uint8))
        np.save(root / split / "depth8" / "b.npy", np.full((6, 8), 102.0))
    pairs = {split: (f"{split}/rgb", f"{split}/depth8") for split in ("train", "test")}
    return layout(root, **({"kind": "folder", "unit": 10 / 255} | pairs | value))


def test_folders_pair_images_and_depth_by_name_and_scale_depth(tmp_path: Path) -> None:
    chosen = folder(tmp_path)
    samples = chosen.samples("test")
    assert [sample.key for sample in samples] == ["a", "b"]
    assert [float(chosen.read(s).depth[0, 0]) for s in samples] == pytest.approx([2.0, 4.0])


def test_a_window_cuts_image_depth_and_normals_alike(tmp_path: Path) -> None:
    normals = np.zeros((6, 8, 3))
    normals[..., 2] = -1
    normals[2, 3] = (1, 0, 0)
    for name in "ab":
        (tmp_path / "n").mkdir(exist_ok=True)
        np.save(tmp_path / "n" / f"{name}.npy", normals)
    window = {"rows": (2, 5), "columns": (3, 7)}
    chosen = folder(tmp_path, window=window, normals=("n", "n"), focal_px=5.0)
    view = chosen.read(chosen.samples("train")[0])
    assert view.image.shape == (3, 4, 3)
    assert view.depth.shape == (3, 4)
    assert view.image[0, 0, 0] == 3
    assert view.normals is not None
    assert view.normals[0, 0].tolist() == [1, 0, 0]
    assert view.normals[1, 1].tolist() == [0, 0, -1]
    # The camera still looks at the middle of what was stored.
    assert (view.centre, view.focal_px) == ((3 - 2, 4 - 3), 5.0)


def test_a_window_beyond_the_image_is_refused(tmp_path: Path) -> None:
    chosen = folder(tmp_path, window={"rows": (2, 7), "columns": (3, 7)})
    with pytest.raises(DataError, match=r"'a' has 6 x 8 px, too few for the window of rows"):
        chosen.read(chosen.samples("train")[0])
    with pytest.raises(ValidationError, match=r"rows: expected .*, got \[5, 5\]"):
        folder(tmp_path, window={"rows": (5, 5), "columns": (3, 7)})


def navi(root: Path) -> Path:
    """One object: 20 x 30 px, its own part the rows 5 to 9 and columns 20 to 26."""
    depth = np.zeros((20, 30), np.uint16)
    depth[5:10, 20:27] = 500
    for scene in ("multiview_00_pixel_5", "wild_set"):
        write_rgb(root / "keywest" / scene / "images" / "000.png", 20, 30)
        (root / "keywest" / scene / "images" / "000.png").rename(
            root / "keywest" / scene / "images" / "000.jpg"
        )
        write_depth(root / "keywest" / scene / "depth" / "000.png", depth)
        entry = {"filename": "000.jpg", "image_size": [20, 30], "camera": {"focal_length": 40.0}}
        (root / "keywest" / scene / "annotations.json").write_text(json.dumps([entry]))
    return root


def test_navi_is_cut_to_the_square_around_its_object(tmp_path: Path) -> None:
    chosen = layout(navi(tmp_path), kind="navi", side=14)
    (train,), (test,) = chosen.samples("train"), chosen.samples("test")
    assert train.key == "keywest/multiview_00_pixel_5/000"
    assert test.key == "keywest/wild_set/000"
    view = chosen.read(test)
    assert view.image.shape == (14, 14, 3)
    # Rows 4 to 10 and columns 20 to 26, each pixel twice.
    assert (view.depth > 0).sum() == 10 * 14
    assert set(np.unique(view.depth)) == {np.float32(0), np.float32(0.5)}
    assert view.depth[2:12].all()
    assert view.focal_px == 80
    assert view.centre == ((10 - 4) * 2, (15 - 20) * 2)


def test_navis_smaller_copies_have_a_shorter_focal_length(tmp_path: Path) -> None:
    navi(tmp_path)
    scene = tmp_path / "keywest" / "wild_set"
    write_rgb(scene / "downsampled_images" / "000.png", 10, 15)
    (scene / "downsampled_images" / "000.png").rename(scene / "downsampled_images" / "000.jpg")
    write_depth(scene / "downsampled_depth" / "000.png", np.full((10, 15), 500, np.uint16))
    (sample,) = layout(tmp_path, kind="navi", downsampled=True).samples("test")
    assert sample.focal_px == 20


def test_an_annotation_of_navi_that_lacks_something_is_named(tmp_path: Path) -> None:
    path = navi(tmp_path) / "keywest" / "wild_set" / "annotations.json"
    path.write_text('[{"filename": "000.jpg"}]')
    with pytest.raises(DataError, match=r"wild_set/annotations.json': KeyError.*focal_length"):
        layout(tmp_path, kind="navi").samples("test")


def test_an_object_without_depth_is_named(tmp_path: Path) -> None:
    path = navi(tmp_path) / "keywest" / "wild_set" / "depth" / "000.png"
    write_depth(path, np.zeros((20, 30), np.uint16))
    chosen = layout(tmp_path, kind="navi")
    with pytest.raises(DataError, match="000.png' has no pixel of the object"):
        chosen.read(chosen.samples("test")[0])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("nyuv2", r"no .*nyu_train.txt; expected under .*RGB DEPTH FOCAL.*sync_depth_"),
        ("folder", r"no .*train/rgb; expected under .*depth/\*.png or \*.npy"),
        ("navi", r"no \*/multiview_\*/annotations.json in .*<object>/wild_set/\{images,depth\}"),
    ],
)
def test_a_set_that_is_not_there_shows_the_tree(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        layout(tmp_path, kind=kind).samples("train")


def test_an_image_without_depth_shows_the_tree(tmp_path: Path) -> None:
    chosen = folder(tmp_path)
    (tmp_path / "test" / "depth8" / "a.png").unlink()
    with pytest.raises(DataError, match="(?s)no .*test/depth8/a.png; expected under"):
        chosen.samples("test")


def test_depth_of_another_size_than_its_image_is_refused(tmp_path: Path) -> None:
    chosen = folder(tmp_path)
    write_depth(tmp_path / "test" / "depth8" / "a.png", np.zeros((5, 8), np.uint8))
    with pytest.raises(DataError, match="the depth '.*a.png' is 5 x 8, its image 6 x 8"):
        chosen.read(chosen.samples("test")[0])


def test_numbers_that_are_no_depth_are_unknown(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[np.nan, np.inf, 2.0]]))
    assert read_depth(tmp_path / "d.npy", 0.5).tolist() == [[0, 0, 1]]


def test_normals_of_a_picture_have_unit_length_or_are_unknown(tmp_path: Path) -> None:
    pixels = np.array([[[255, 128, 128], [128, 128, 128], [128, 0, 128]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "n.png")
    normals = read_normals(tmp_path / "n.png")
    assert np.allclose(normals[0], [[1, 0, 0], [0, 0, 0], [0, -1, 0]], atol=0.01)
    assert np.allclose(np.linalg.norm(normals[0], axis=1), [1, 0, 1], atol=1e-6)


def test_files_of_other_shapes_are_refused(tmp_path: Path) -> None:
    write_rgb(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"rgb.png': expected one channel of depth, got 3"):
        read_depth(tmp_path / "rgb.png", 1)
    write_depth(tmp_path / "grey.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(DataError, match=r"normals '.*grey.png': expected RGB colours.*mode L"):
        read_normals(tmp_path / "grey.png")
    (tmp_path / "no.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="the depth '.*no.png': not a PNG"):
        read_depth(tmp_path / "no.png", 1)
