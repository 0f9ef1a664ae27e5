"""Pairs of images with keypoints, read from tiny trees of each layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.labelled.keypoints import KeypointFolders, PFWillow, SPair


def write_image(path: Path, height: int = 4, width: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path)


def write_spair(root: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        write_image(root / "JPEGImages" / "cat" / name)
    facts = {
        "src_imname": "a.jpg",
        "trg_imname": "b.jpg",
        "src_imsize": [6, 4, 3],
        "trg_imsize": [6, 4, 3],
        "src_kps": [[1, 2], [3, 1]],
        "trg_kps": [[2, 2], [4, 1]],
        "src_bndbox": [0, 0, 5, 3],
        "trg_bndbox": [1, 0, 5, 3],
        "kps_ids": ["0", "7"],
        "category": "cat",
        "viewpoint_variation": 2,
    }
    path = root / "PairAnnotation" / "test" / "000001-a-b:cat.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(facts))


def test_spair_has_the_points_of_both_and_the_targets_box(tmp_path: Path) -> None:
    write_spair(tmp_path)
    (pair,) = SPair(kind="spair", root=tmp_path).pairs()
    assert (pair.source.name, pair.target.name) == ("a.jpg", "b.jpg")
    assert pair.source_points.tolist() == [[1, 2], [3, 1]]
    assert pair.target_points.tolist() == [[2, 2], [4, 1]]
    assert (pair.extent_px, pair.category, pair.viewpoint) == (4, "cat", 2)


def test_spair_that_is_not_there_shows_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"PairAnnotation/test; expected(.|\n)*JPEGImages/<cat"):
        SPair(kind="spair", root=tmp_path).pairs()


def test_a_pair_that_lacks_a_key_is_named(tmp_path: Path) -> None:
    write_spair(tmp_path)
    path = next(tmp_path.rglob("*.json"))
    facts = json.loads(path.read_text())
    del facts["trg_kps"]
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"a-b:cat.json': KeyError: 'trg_kps'"):
        SPair(kind="spair", root=tmp_path).pairs()


def test_pf_willow_lists_all_x_before_all_y(tmp_path: Path) -> None:
    names = ["PF-dataset/car(G)/a.png", "PF-dataset/car(G)/b.png"]
    for name in names:
        write_image(tmp_path / name)
    heading = ["imageA", "imageB", *(f"{axis}{i}" for axis in "xyzw" for i in range(10))]
    line = [*names, *map(str, range(40))]
    (tmp_path / "test_pairs.csv").write_text(f"{','.join(heading)}\n{','.join(line)}\n")
    (pair,) = PFWillow(kind="pf_willow", root=tmp_path).pairs()
    assert pair.source_points.tolist() == [[i, 10 + i] for i in range(10)]
    assert pair.target_points.tolist() == [[20 + i, 30 + i] for i in range(10)]
    assert (pair.extent_px, pair.category) == (9, "car(G)")


def test_pf_willow_that_is_not_there_shows_its_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test_pairs.csv; expected(.|\n)*ten x and ten y"):
        PFWillow(kind="pf_willow", root=tmp_path).pairs()


def test_a_line_of_another_length_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_pairs.csv").write_text("heading\na.png,b.png,1,2\n")
    with pytest.raises(DataError, match="test_pairs.csv, line 2: expected 42 columns, .* got 4"):
        PFWillow(kind="pf_willow", root=tmp_path).pairs()


def test_folders_match_every_image_with_every_other_of_its_category(tmp_path: Path) -> None:
    for category, names in {"car": "abc", "duck": "de"}.items():
        for name in names:
            write_image(tmp_path / category / f"{name}.png")
        points = {name: [[0, 0], [5, 2]] for name in names}
        (tmp_path / category / "keypoints.json").write_text(json.dumps(points))
    pairs = KeypointFolders(kind="keypoints", root=tmp_path).pairs()
    assert [pair.category for pair in pairs] == ["car"] * 6 + ["duck"] * 2
    assert len({(pair.source, pair.target) for pair in pairs}) == 8
    assert pairs[0].extent_px == 5


def test_points_that_one_image_does_not_show_are_left_out(tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / "x" / f"{name}.jpg")
    points = {"a": [None, [1, 1], [2, 2]], "b": [[9, 0], [3, 3], None]}
    (tmp_path / "x" / "keypoints.json").write_text(json.dumps(points))
    first, _ = KeypointFolders(kind="keypoints", root=tmp_path).pairs()
    assert first.source_points.tolist() == [[1, 1]]
    assert first.target_points.tolist() == [[3, 3]]
    assert first.extent_px == 6  # of all that the target shows


@pytest.mark.parametrize(
    "points, message",
    [
        ({"a": [[0, 0]], "b": [[0, 0], [1, 1]]}, "different numbers of points"),
        ({"a": [[0, 0]], "c": [[0, 0]]}, "has 'c', but there is no such image"),
        ([1], "expected a mapping"),
        ({"a.jpg": [[0, 0]], "b": [[0, 0]]}, r"has 'a.jpg', .* \(did you mean 'a'\?\)"),
        ({"a": [[0, 0, 2]], "b": [[0, 0, 1]]}, "'a': .*a third number, of visibility"),
        ({"a": 5, "b": [[0, 0]]}, r"'a': expected \[\[x, y\] or null, ...\], got 5"),
        ({"a": [["x", 1]], "b": [[0, 0]]}, "'a': expected"),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, points: object, message: str) -> None:
    for name in "ab":
        write_image(tmp_path / "x" / f"{name}.jpg")
    (tmp_path / "x" / "keypoints.json").write_text(json.dumps(points))
    with pytest.raises(DataError, match=message):
        KeypointFolders(kind="keypoints", root=tmp_path).pairs()


def test_folders_without_keypoints_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("x/a", "x/b", "y/a", ".thumbnails/a"):
        write_image(tmp_path / f"{name}.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x/keypoints.json").write_text(json.dumps({"a": [[0, 0]], "b": [[1, 1]]}))
    assert len(KeypointFolders(kind="keypoints", root=tmp_path).pairs()) == 2
    assert "left out 1 folders of images without keypoints.json, such as y" in caplog.text


def test_no_folder_shows_the_tree(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected under(.|\n)*<category>/keypoints.json"):
        KeypointFolders(kind="keypoints", root=tmp_path).pairs()
