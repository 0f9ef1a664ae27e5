"""Surveys of keypoints, posed frames, class folders, captions, multi-task sets and plain images."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from data.errors import DataError
from data.labelled.captions import CocoCaptions
from data.labelled.class_folders import ClassFolders
from data.labelled.image_surveys import CaptionSurvey, ClassFolderSurvey, ImagesSurvey
from data.labelled.keypoint_survey import KeypointSurvey
from data.labelled.keypoints import AnyKeypoints
from data.labelled.multitask import NyudLayout, PascalContextLayout
from data.labelled.multitask_survey import MultiTaskSurvey
from data.labelled.posed import AnyPosed
from data.labelled.posed_survey import PosedSurvey
from data.labelled.survey import SPLITS, Survey, told
from tests.test_benchmarks_multitask import write_nyud, write_pascal

POINTS = [[10.0, 5.0], [70.0, 50.0], [20.0, 30.0]]


def save(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def judged(survey: Survey) -> tuple[str, str]:
    """What is fatal, and what is not."""
    counts = json.loads(json.dumps(survey.count()))
    findings = survey.judge(counts)
    parts = [told(f for f in findings if f.fatal is wanted) for wanted in (True, False)]
    return "; ".join(parts[0]), "; ".join(parts[1])


def keypoints(
    root: Path, points: Any, size: tuple[int, int] = (60, 80), source: Any = POINTS
) -> KeypointSurvey:
    for name in ("one", "two"):
        save(root / "car" / f"{name}.png", np.zeros((*size, 3), np.uint8))
    (root / "car/keypoints.json").write_text(json.dumps({"one": source, "two": points}))
    entry = {"kind": "keypoints", "root": str(root)}
    return KeypointSurvey(TypeAdapter(AnyKeypoints).validate_python(entry))


def test_points_inside_their_images_are_right(tmp_path: Path) -> None:
    assert judged(keypoints(tmp_path, POINTS)) == ("", "")


@pytest.mark.parametrize(
    "points, fatal, warned",
    [
        ([None, None, None], "no keypoint is visible in two images", ""),
        ([[10, 5], None, None], "", "2 pairs have a target whose box|1 pairs have a target"),
        ([[10, 5], [700, 50], [20, 30]], "", "2 of 12 points (16.7 %) lie outside of their image;"),
        ([[900, 5], [700, 50], [20, 30]], "4 of 12 points (33.3 %) lie outside", ""),
    ],
)
def test_points_that_cannot_be_are_told(
    tmp_path: Path, points: Any, fatal: str, warned: str
) -> None:
    came = judged(keypoints(tmp_path, points))
    assert fatal in came[0]
    assert bool(fatal) == bool(came[0])
    assert any(each in came[1] for each in warned.split("|"))


def test_points_as_y_x_or_as_shares_are_named(tmp_path: Path) -> None:
    turned = [[70.0, 30.0], [75.0, 40.0], [79.0, 55.0]]
    survey = keypoints(tmp_path / "yx", turned, (100, 58), source=turned)
    assert "are they y, x, or of images of another size?" in judged(survey)[0]
    shares = [[0.1, 0.5], [0.9, 0.2], [0.3, 0.3]]
    survey = keypoints(tmp_path / "shares", shares, source=shares)
    assert "are they shares of the image's sides?" in judged(survey)[0]


def posed(root: Path, depth: Any = 1500, step_m: float = 0.1, turn: float = 1.0) -> PosedSurvey:
    for number in range(3):
        values = depth[number] if isinstance(depth, list) else depth
        stem = root / f"seq/frame-{number:06d}"
        save(stem.with_name(f"{stem.name}.color.png"), np.zeros((12, 16, 3), np.uint8))
        save(stem.with_name(f"{stem.name}.depth.png"), np.full((12, 16), values, np.uint16))
        pose = np.diag([turn, 1, 1, 1.0])
        pose[0, 3] = number * step_m
        np.savetxt(stem.with_name(f"{stem.name}.pose.txt"), pose)
    layout = TypeAdapter(AnyPosed).validate_python({"kind": "seven_scenes", "root": str(root)})
    return PosedSurvey(layout, layout.pairs(), 4)


def test_posed_frames_are_right(tmp_path: Path) -> None:
    assert judged(posed(tmp_path)) == ("", "")


def test_frames_without_depth_are_named(tmp_path: Path) -> None:
    fatal, _ = judged(posed(tmp_path, [1500, 0, 65535]))
    assert fatal.startswith("2 of 3 frames have no depth at two points or more: ")
    assert "frame-000001.depth.png" in fatal


def test_depth_or_poses_in_another_unit_are_refused(tmp_path: Path) -> None:
    fatal, _ = judged(posed(tmp_path / "a", depth=2))
    assert "the median depth is 0.002 m: are the depth maps in another unit?" in fatal
    fatal, _ = judged(posed(tmp_path / "b", step_m=100))
    assert "cameras are 100 m apart (median) and see things at 1.5 m" in fatal
    fatal, _ = judged(posed(tmp_path / "c", turn=3.0))
    assert "3 of 3 poses are no rotation and translation" in fatal
    fatal, _ = judged(posed(tmp_path / "d", turn=-1.0))
    assert "3 of 3 poses are no rotation and translation" in fatal  # mirrored


def test_poses_of_rows_are_refused(tmp_path: Path) -> None:
    layout = posed(tmp_path)._dataset
    for path in tmp_path.glob("seq/*.pose.txt"):
        np.savetxt(path, np.loadtxt(path).T)
    fatal, _ = judged(PosedSurvey(layout, layout.pairs(), 4))
    assert "2 of 3 poses are no rotation and translation" in fatal  # the first is the identity


def test_posed_depth_of_8_bits_is_refused(tmp_path: Path) -> None:
    survey = posed(tmp_path)
    for path in tmp_path.glob("seq/*.depth.png"):
        save(path, np.full((12, 16), 200, np.uint8))
    with pytest.raises(DataError, match="expected whole numbers of 16 bits, got uint8"):
        survey.count()


def test_frames_without_a_pose_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = posed(tmp_path)._dataset
    assert not caplog.text
    (tmp_path / "seq/frame-000001.pose.txt").unlink()
    assert len(layout.pairs()) == 1
    assert "left out 1 frames without a pose, such as seq/frame-000001.color.png" in caplog.text
    (tmp_path / "seq/frame-000001.pose.txt").write_text("")  # numpy would warn of it on its own
    with pytest.raises(DataError, match="expected a 4 x 4 matrix of finite numbers"):
        layout.pairs()


def folders(root: Path, train: dict[str, int], val: dict[str, int]) -> ClassFolders:
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                save(root / split / name / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
    return ClassFolders(root=root)


def test_classes_without_an_image_are_told(tmp_path: Path) -> None:
    dataset = folders(tmp_path, {"a": 2, "b": 1, "c": 1, "d": 0}, {"a": 1, "b": 1, "c": 0})
    fatal, warned = judged(ClassFolderSurvey(dataset, SPLITS))
    assert not fatal
    assert "no image in test of 1 of 3 classes (c): never counted" in warned
    assert "1 folders of train hold no image (d): they are no classes" in warned


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    survey = ClassFolderSurvey(folders(tmp_path, {"a": 2, "b": 2}, {"b": 3}), SPLITS)
    assert "all labelled images of test (3) are of one class, 'b'" in judged(survey)[0]
    survey = ClassFolderSurvey(folders(tmp_path / "one", {"a": 2}, {"a": 3}), SPLITS)
    assert judged(survey)[0] == "there is one class only, 'a'"


def test_more_shots_or_neighbours_than_images_are_told(tmp_path: Path) -> None:
    dataset = folders(tmp_path, {"a": 2, "b": 3}, {"a": 1, "b": 1})
    few = ClassFolderSurvey(dataset.model_copy(update={"shots": 3}), SPLITS)
    assert "1 of 2 classes have fewer than 3 training images (a 2)" in judged(few)[1]
    many = ClassFolderSurvey(dataset, SPLITS, neighbours=(20, 6, 5))
    assert "neighbours 20, 6: there are 5 training images, and all of them vote" in judged(many)[1]


def test_the_files_of_folders_and_archives_are_listed(tmp_path: Path) -> None:
    dataset = folders(tmp_path / "set", {"a": 2, "b": 1}, {"a": 1, "b": 1})
    found = ClassFolderSurvey(dataset, SPLITS)
    assert len(found.files()) == 5
    assert all(path.is_file() for path in found.files())
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    packed = ClassFolderSurvey(ClassFolders(root=Path(archive)), SPLITS)
    assert packed.files() == [Path(archive)]
    assert packed.count()["train"]["classes"] == [2, 1]


def test_a_broken_first_image_of_a_class_is_found(tmp_path: Path) -> None:
    dataset = folders(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    (tmp_path / "val/a/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="the image '.*/val/a/0.png'"):
        ClassFolderSurvey(dataset, SPLITS)


def captions(root: Path, texts: list[str], images: int = 2) -> CaptionSurvey:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number in range(images):
        save(root / f"val2017/{number}.png", np.zeros((4, 4, 3), np.uint8))
    tree = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": i % images, "caption": text} for i, text in enumerate(texts)
        ],
    }
    (root / "annotations/captions_val2017.json").write_text(json.dumps(tree))
    return CaptionSurvey(CocoCaptions(kind="coco_captions", root=root))


def test_captions_without_text_are_told(tmp_path: Path) -> None:
    assert judged(captions(tmp_path, ["a dog", "a cat"])) == ("", "")
    _, warned = judged(captions(tmp_path, ["a dog", "a cat", " ", "a cow"]))
    assert warned == "1 of 4 captions (25 %) are without text"
    assert "2 of 2 captions" in judged(captions(tmp_path, ["", " "]))[0]


def test_captions_that_tell_nothing_apart_are_refused(tmp_path: Path) -> None:
    fatal, _ = judged(captions(tmp_path / "a", ["a photo", "a photo"]))
    assert fatal == "all 2 captions are the same: nothing tells images apart"
    assert judged(captions(tmp_path / "b", ["a dog"], images=1))[0] == "there is one image only"


def test_an_image_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    captions(tmp_path, ["a dog", "a cat"])
    path = tmp_path / "annotations/captions_val2017.json"
    tree = json.loads(path.read_text())
    tree["images"][1]["file_name"] = tree["images"][0]["file_name"]
    path.write_text(json.dumps(tree))
    survey = CaptionSurvey(CocoCaptions(kind="coco_captions", root=tmp_path))
    assert "1 images occur more than once" in judged(survey)[0]


def test_multi_task_sets_are_right(tmp_path: Path) -> None:
    nyud = MultiTaskSurvey(NyudLayout(kind="nyud", root=write_nyud(tmp_path / "nyud")))
    fatal, warned = judged(nyud)
    assert not fatal
    assert "semseg: no pixel anywhere of 36 of 40 classes" in warned
    assert len(nyud.files()) == 4 * 8
    root = write_pascal(tmp_path / "pascal")
    pascal = MultiTaskSurvey(PascalContextLayout(kind="pascal_context", root=root))
    assert judged(pascal)[0] == ""
    assert all(path.is_file() for path in pascal.files())


def test_an_image_that_a_multi_task_list_has_twice_is_refused(tmp_path: Path) -> None:
    root = write_nyud(tmp_path)
    path = root / "gt_sets/val.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match="test lists .* more than once"):
        MultiTaskSurvey(NyudLayout(kind="nyud", root=root))


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("void", "semseg: train has no pixel of any class"),
        ("normals", "normals: train has no pixel with a normal"),
        ("zeros", "depth: train has no pixel with a depth"),
        ("millimetres", "depth: the median depth of train is 4e+03 m; expected metres: are the f"),
    ],
)
def test_a_task_without_truth_is_refused(tmp_path: Path, spoil: str, message: str) -> None:
    root = write_nyud(tmp_path)
    for path in (root / "images").glob("train*.png"):
        size = np.asarray(Image.open(path)).shape[:2]
        if spoil == "void":
            save(root / "segmentation" / path.name, np.zeros(size, np.uint8))
        elif spoil == "normals":
            save(root / "normals" / path.name, np.full((*size, 3), 128, np.uint8))
        else:
            value = 0.0 if spoil == "zeros" else 4000.0
            np.save(root / "depth" / f"{path.stem}.npy", np.full(size, value))
    assert message in judged(MultiTaskSurvey(NyudLayout(kind="nyud", root=root)))[0]


def test_labels_beyond_the_classes_of_a_multi_task_set_are_refused(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    path = next((root / "semseg/VOC12").glob("val*.png"))
    size = np.asarray(Image.open(path)).shape
    save(path, np.full(size, 40, np.uint8))
    survey = MultiTaskSurvey(PascalContextLayout(kind="pascal_context", root=root))
    with pytest.raises(DataError, match="expected 0 to 20 or 255, got 40"):
        survey.count()


def test_plain_images_are_listed_and_the_first_is_decoded(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"set/deep/{number}.png", np.zeros((4, 4, 3), np.uint8))
    assert len(ImagesSurvey(tmp_path / "set").files()) == 3
    assert ImagesSurvey(tmp_path / "set/deep/0.png").files() == [tmp_path / "set/deep/0.png"]
    (tmp_path / "set/deep/0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"set/deep/0.png'"):
        ImagesSurvey(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image .*in .*empty"):
        ImagesSurvey(tmp_path / "empty")
    with pytest.raises(DataError, match="nowhere' does not exist"):
        ImagesSurvey(tmp_path / "nowhere")
