"""Which files count as images, for every reader, and what is said of those left out."""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.image_files import describe_left_out, is_hidden, is_image
from data.images import load_images
from data.index import load_index
from data.labelled.captions import CaptionData
from data.labelled.class_folders import ClassFolders, read_class_names
from data.labelled.depth import FolderDepth
from data.labelled.detection import CocoLayout
from data.labelled.files import read_json, read_lines
from data.labelled.keypoints import KeypointFolders, PFWillow
from data.labelled.posed import SevenScenes
from data.labelled.segmentation import AnySegmentation
from data.layout import fixed_layout
from data.shards import list_shards
from data.stream import TrainStream
from data.write_shards import main as write_shards


def picture(path: Path, size: tuple[int, int] = (3, 2)) -> Path:
    """An image of the format that its extension states, JPEG where Pillow has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
    Image.new("RGB", size, (10, 20, 30)).save(path, kinds.get(path.suffix.lower(), "JPEG"))
    return path


def labels(path: Path, value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(path, "PNG")
    return path


def segmentation(kind: str, root: Path, **options: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySegmentation)
    return adapter.validate_python({"kind": kind, "root": str(root), **options})


def folder(root: Path) -> Any:
    return segmentation("folder", root, classes=["x", "y"], test=["in", "out"])


@pytest.mark.parametrize(
    "name, hidden",
    [
        ("a.jpg", False),
        ("x/a.JPEG", False),
        ("./a.jpg", False),
        ("../a.jpg", False),
        ("x..y/a.jpg", False),
        ("._a.jpg", True),
        (".a.jpg", True),
        ("x/.ipynb_checkpoints/a.jpg", True),
        ("__MACOSX/a.jpg", True),
        ("x/__MACOSX/a.jpg", True),
        ("my__MACOSX/a.jpg", False),
        ("x/Thumbs.db", True),
        ("x/thumbs.db", True),
        ("desktop.ini", True),
        (".DS_Store", True),
        ("@eaDir/a.jpg", True),
    ],
)
def test_hidden_files_and_those_of_systems_are_no_images(name: str, hidden: bool) -> None:
    assert is_hidden(name) == hidden
    assert is_image(name) == (not hidden)


def test_what_is_left_out_is_counted_by_kind_and_named() -> None:
    names = ["a.tif", "b.TIF", "c.tif", "d.tif", ".DS_Store", "README", "x\n.bmp"]
    assert describe_left_out(names) == (
        "1 (none) (README), 1 .bmp (x\\x0a.bmp), 4 .tif (a.tif, b.TIF, c.tif, ...), "
        "1 hidden (.DS_Store)"
    )


NAMES = ("a.JPG", "b.jpeg", "c.png", "d.webp", "e.PNG", "f.Jpg")


def test_a_labelled_folder_is_read_whole_whatever_the_case_of_its_extensions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES:
        picture(tmp_path / "in" / name)
        labels(tmp_path / "out" / f"{name[0]}.{'PNG' if name[0] in 'ab' else 'png'}")
    found = folder(tmp_path).samples("test")
    assert [sample.image.name for sample in found] == list(NAMES)
    assert [sample.key for sample in found] == list("abcdef")
    for sample in found:
        folder(tmp_path).read(sample)
    assert caplog.text == ""


def test_pictures_of_other_formats_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jpg", "b.tiff", "c.bmp", "._a.jpg", "Thumbs.db", "inner/d.jpg"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").touch()
    labels(tmp_path / "out/a.png")
    for _ in range(2):
        assert len(folder(tmp_path).samples("test")) == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"'{tmp_path}/in': left out 1 .bmp (c.bmp), 1 .tiff (b.tiff), 1 folder (inner/), 2 hidden "
        "(._a.jpg, Thumbs.db); images are jpg, jpeg, png, webp"
    )


def test_a_folder_of_other_formats_alone_is_refused_with_their_names(tmp_path: Path) -> None:
    picture(tmp_path / "in/b.tiff")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"no image \(jpg.*; there are 1 .tiff \(b.tiff\)"):
        folder(tmp_path).samples("test")


def test_an_image_without_a_label_map_is_refused_with_the_tree(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / "in" / name)
    labels(tmp_path / "out/a.png")
    picture(tmp_path / "out/b.bmp")
    with pytest.raises(DataError) as caught:
        folder(tmp_path).samples("test")
    text = str(caught.value)
    assert "2 of 3 images in in have no label map (png) (there is b.bmp, which is not read)" in text
    assert f"for 'b.jpg' there is no {tmp_path}/out/b.png; expected under" in text
    assert "annotations/validation/*.png" in text


def test_a_pipe_and_a_broken_link_are_refused(tmp_path: Path) -> None:
    """Reading a pipe waits for ever; class folders and plain images refuse both too."""
    picture(tmp_path / "in/a.jpg")
    labels(tmp_path / "out/a.png")
    (tmp_path / "in/d.jpg").symlink_to("a.jpg")
    labels(tmp_path / "out/d.png")
    assert [s.key for s in folder(tmp_path).samples("test")] == ["a", "d"]
    (tmp_path / "in/c.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match="in/c.jpg' is a broken link or special file"):
        folder(tmp_path).samples("test")
    (tmp_path / "in/c.jpg").unlink()
    os.mkfifo(tmp_path / "in/b.jpg")
    with pytest.raises(DataError, match="in/b.jpg' is a broken link or special file"):
        folder(tmp_path).samples("test")


def test_a_label_map_without_its_image_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "in/a.jpg")
    for name in "abcde":
        labels(tmp_path / f"out/{name}.png")
    assert len(folder(tmp_path).samples("test")) == 1
    assert "out': 4 files (label map) have no image: b.png, c.png, d.png, ..." in caplog.text


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.jpg", "a.JPG"), ("a.jpeg", "a.webp")])
def test_two_images_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """Both would be paired with one label map, and count twice."""
    for name in names:
        picture(tmp_path / "in" / name)
    labels(tmp_path / "out/a.png")
    first, second = sorted(names)
    with pytest.raises(DataError, match=f"in' has both '{first}' and '{second}'"):
        folder(tmp_path).samples("test")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": ["x", "y", "x"]}, "classes: 'x' occurs twice"),
        ({"colours": [[1, 2, 3], [1, 2, 3]]}, r"colours: \(1, 2, 3\) occurs twice"),
        ({"colours": [[0, 0, 300], [0, 1, 44]]}, "less than or equal to 255"),
        ({"ignored": [0]}, "ignored: 0 is the number of 'x'"),
    ],
)
def test_classes_that_would_be_one_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        segmentation("folder", tmp_path, **({"classes": ["x", "y"]} | changes))


def depth_set(root: Path, *depths: str) -> FolderDepth:
    for name in ("a.JPG", "b.jpeg"):
        picture(root / "test/rgb" / name)
    (root / "test/depth").mkdir()
    for name in depths:
        if name.endswith("npy"):
            np.save(root / "test/depth" / name, np.full((2, 3), 1500, np.uint16))
        else:
            kind = "TIFF" if name.lower().endswith("tif") else "PNG"
            depth = Image.fromarray(np.full((2, 3), 1500, np.uint16))
            depth.save(root / "test/depth" / name, kind)
    return FolderDepth(kind="folder", root=root)


def test_depth_is_found_in_any_case_and_format(tmp_path: Path) -> None:
    found = depth_set(tmp_path, "a.PNG", "b.tif")
    samples = found.samples("test")
    assert [(s.image.name, s.depth.name) for s in samples] == [
        ("a.JPG", "a.PNG"),
        ("b.jpeg", "b.tif"),
    ]
    assert all((found.read(sample).depth == np.float32(1.5)).all() for sample in samples)


def test_depth_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has both 'a.npy' and 'a.png'"):
        depth_set(tmp_path, "a.png", "a.npy", "b.png").samples("test")


def test_depth_without_an_image_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(depth_set(tmp_path, "a.png", "b.png", "c.png").samples("test")) == 2
    assert "1 files (depth) have no image: c.png" in caplog.text


def voc(root: Path, listed: str, *images: str) -> Any:
    top = root / "VOCdevkit/VOC2012"
    for name in images:
        picture(top / "JPEGImages" / name)
        labels(top / "SegmentationClass" / f"{Path(name).stem}.png")
    lists = top / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_bytes(listed.encode("utf-8-sig"))
    return segmentation("pascal_voc", root)


def test_a_listed_image_is_found_in_any_case_and_the_list_keeps_its_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = voc(tmp_path, "b\r\na\r\n", "a.JPG", "b.jpeg", "c.jpg", "d.tiff").samples("test")
    assert [s.image.name for s in found] == ["b.jpeg", "a.JPG"]  # the mark before b is no letter
    assert caplog.text == ""  # a list says what belongs to a split


@pytest.mark.parametrize(
    "listed, message",
    [
        ("a\nbird\n", r"JPEGImages has no bird.jpg, which is in the list .*1 of 2 .*'bird1.jpg'"),
        ("a\na\n", r"the list of the images in .*JPEGImages has 'a' more than once"),
        ("y" * 4000, r"has no y{50,}\.\.\.y{50,}.jpg, which is in the list"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, listed: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        voc(tmp_path, listed, "a.jpg", "bird1.jpg").samples("test")


def test_a_listed_image_without_a_label_map_shows_the_tree(tmp_path: Path) -> None:
    found = voc(tmp_path, "a\n", "a.jpg", "b.jpg")
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/a.png").unlink()
    with pytest.raises(DataError, match=r"there is no .*Class/a.png; expected under(.|\n)*JPEGIm"):
        found.samples("test")


def test_cityscapes_leaves_out_what_a_mac_adds_and_names_a_missing_label_map(
    tmp_path: Path,
) -> None:
    for name in ("bonn/b_1_leftImg8bit.png", "bonn/._b_1_leftImg8bit.png"):
        picture(tmp_path / "leftImg8bit/val" / name)
    labels(tmp_path / "gtFine/val/bonn/b_1_gtFine_labelIds.png")
    found = segmentation("cityscapes", tmp_path)
    assert [sample.key for sample in found.samples("test")] == ["b_1"]
    picture(tmp_path / "leftImg8bit/val/bonn/b_2_leftImg8bit.png")
    with pytest.raises(DataError, match=r"no .*bonn/b_2_gtFine_labelIds.png; expected under"):
        found.samples("test")


CLASSES = ("train/cat/1.JPG", "train/dog/2.jpeg", "train/dog/3.webp", "val/cat/4.jpg")
BESIDE = (
    *("train/.ipynb_checkpoints/1-checkpoint.jpg", "train/cat/._1.JPG", "train/cat/Thumbs.db"),
    *("train/cat/5.tiff", "train/dog/6.bmp", "train/dog/7.avif", "train/dog/8.gif"),
)


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_name_what_they_leave_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, packed: bool
) -> None:
    for name in (*CLASSES, *BESIDE):
        picture(tmp_path / "set" / name)
    root = tmp_path / "set"
    if packed:
        root = tmp_path / "set.zip"
        with zipfile.ZipFile(root, "w") as archive:
            for name in (*CLASSES, *BESIDE, "__MACOSX/train/._x"):
                archive.writestr(name, (tmp_path / "set" / CLASSES[0]).read_bytes())
    with ClassFolders(root=root).open("train") as images:
        assert images.classes == ["cat", "dog"]
        assert [Path(name).name for name in images.names] == ["1.JPG", "2.jpeg", "3.webp"]
        assert images.labels == [0, 1, 1]
    for name in ("cat/5.tiff", "dog/6.bmp", "dog/7.avif", "dog/8.gif", "3 hidden"):
        assert name in caplog.text or (packed and name == "3 hidden" and "4 hidden" in caplog.text)
    assert ".ipynb_checkpoints/1-checkpoint.jpg" in caplog.text


def test_a_class_of_which_nothing_is_read_is_refused(tmp_path: Path) -> None:
    """It would vanish, and the classes after it would get its number."""
    for name in (*CLASSES, "train/bird/1.tiff", "train/bird/2.tiff"):
        picture(tmp_path / name)
    with (
        pytest.raises(DataError, match=r"class 'bird' that is read .* only 2 .tiff \(bird/1.tiff"),
        ClassFolders(root=tmp_path).open("train"),
    ):
        pass


def test_evaluation_images_name_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.JPG", "b.tif", ".cache/c.jpg", "sub/d.jpeg", "sub/._d.jpeg"):
        picture(tmp_path / "set" / name)
    assert load_images(tmp_path / "set", (8, 8))[1] == ["a.JPG", "sub/d.jpeg"]
    assert "left out 1 .tif (b.tif), 2 hidden (.cache/c.jpg, sub/._d.jpeg)" in caplog.text
    picture(tmp_path / "other/b.tif")
    with pytest.raises(DataError, match=r"no image .* in .*other; there are 1 .tif \(b.tif\)"):
        load_images(tmp_path / "other", (8, 8))
    with pytest.raises(DataError, match=r"b.tif': .tif images are not read"):
        load_images(tmp_path / "other/b.tif", (8, 8))


def test_writing_shards_leaves_out_hidden_files_and_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.JPG", "._a.JPG", ".thumbs/a.jpg", "b.tif"):
        picture(tmp_path / "set" / name)
    assert write_shards([str(tmp_path / "set"), str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["samples"] == 1
    assert manifest["ignored"] == {".tif": 1, "hidden": 2}
    assert "1 .tif, 2 hidden" in capsys.readouterr().out


def test_keypoints_find_images_in_any_case_and_name_those_without_points(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.JPG", "b.Jpeg", "c.jpg", "b.tiff"):
        picture(tmp_path / "car" / name)
    points = tmp_path / "car/keypoints.json"
    points.write_bytes(json.dumps({"a": [[1, 1]], "b": [[2, 1]]}).encode("utf-8-sig"))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints/keypoints.json").write_text("{}")
    pairs = KeypointFolders(kind="keypoints", root=tmp_path).pairs()
    assert [(p.source.name, p.target.name) for p in pairs] == [
        ("a.JPG", "b.Jpeg"),
        ("b.Jpeg", "a.JPG"),
    ]
    assert "1 images have no keypoints, such as c.jpg" in caplog.text
    assert "1 .tiff (b.tiff)" in caplog.text
    picture(tmp_path / "car/a.png")
    with pytest.raises(DataError, match="has both 'a.JPG' and 'a.png'"):
        KeypointFolders(kind="keypoints", root=tmp_path).pairs()


@pytest.mark.parametrize("content", ['{"a": 3}', '{"a": [["x", "y"]]}', '{"a": [[1, 2, 3]]}'])
def test_points_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    picture(tmp_path / "car/a.jpg")
    (tmp_path / "car/keypoints.json").write_text(content)
    with pytest.raises(DataError, match="keypoints.json: 'a': expected"):
        KeypointFolders(kind="keypoints", root=tmp_path).pairs()


def test_frames_in_hidden_folders_are_left_out(tmp_path: Path) -> None:
    for part in ("seq", ".ipynb_checkpoints"):
        (tmp_path / part).mkdir()
        for number in range(2):
            picture(tmp_path / part / f"frame-{number}.color.jpeg")
            Image.new("I;16", (3, 2)).save(tmp_path / part / f"frame-{number}.depth.png")
            np.savetxt(tmp_path / part / f"frame-{number}.pose.txt", np.eye(4))
    pairs = SevenScenes(kind="seven_scenes", root=tmp_path).pairs()
    assert [first.image.parent.name for first, _ in pairs] == ["seq"]


def test_lists_with_a_byte_order_mark_are_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\nSäge\n\n cañón \n".encode())
    assert read_lines(path) == ["cat", "Säge", "cañón"]
    path.write_bytes("\ufeffwnid\tname\nn1\tcat\n".encode())
    assert read_class_names(path, ["n1"]) == ["cat"]
    path.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_json(path) == {"a": 1}
    path.write_bytes(b"a\rb\r\nc\x0bd\n\xe2\x80\xa8e")  # other separators are parts of names
    assert read_lines(path) == ["a", "b", "c\x0bd", "e"]


@pytest.mark.parametrize(
    "data, message",
    [
        ("cat\nSäge\nx".encode("latin-1"), r"line 2: not in UTF-8 \(it would be 'Sä' in Latin-1\)"),
        ("cat\nSäge".encode("utf-16"), "is in UTF-16; save it in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "fetch it with `git lfs pull`"),
    ],
)
@pytest.mark.parametrize("read", [read_lines, read_json])
def test_lists_in_another_encoding_are_refused(
    tmp_path: Path, read: Any, data: bytes, message: str
) -> None:
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "names.txt")


@pytest.mark.parametrize("name", ["", "é".encode("latin-1")])
def test_tables_and_annotations_are_read_alike(tmp_path: Path, name: str | bytes) -> None:
    """CSV and JSON of captions, keypoints and boxes: with the mark right, in Latin-1 refused."""
    text = '\ufefffilename,split,raw\na.jpg,test,"[""x""]"\n'
    bad = isinstance(name, bytes)
    (tmp_path / "c.csv").write_bytes(text.encode() + (b"\xe9,test,[]\n" if bad else b""))
    adapter: TypeAdapter[Any] = TypeAdapter(CaptionData)
    options = {"captions": "c.csv", "images": "."}
    captions = adapter.validate_python({"kind": "karpathy_captions", "root": tmp_path, **options})
    picture(tmp_path / "a.jpg")
    (tmp_path / "test_pairs.csv").write_bytes(b"\xe9" if bad else b"\xef\xbb\xbfheader\n")
    coco = (
        b"\xef\xbb\xbf"
        + json.dumps(
            {
                "categories": [{"id": 1, "name": "x"}],
                "images": [{"id": 1, "file_name": "a.jpg", "height": 2, "width": 3}],
                "annotations": [],
            }
        ).encode()
    )
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_bytes(b"\xe9" if bad else coco)
    willow = PFWillow(kind="pf_willow", root=tmp_path)
    if bad:
        for read in (captions.load, willow.pairs, lambda: CocoLayout(root=tmp_path).load("test")):
            with pytest.raises(DataError, match="not in UTF-8"):
                read()
    else:
        assert captions.load().captions == [["x"]]
        assert willow.pairs() == []
        assert CocoLayout(root=tmp_path).load("test").classes == ("x",)


def test_a_folder_of_compressed_shards_is_told_so(tmp_path: Path) -> None:
    for name in ("000.tar.gz", "001.tgz"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"no \*.tar file, but 2 compressed archives .*: unpack"):
        list_shards([str(tmp_path)])


def test_shards_are_found_in_any_case_and_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.tar", "1.TAR", "._0.tar", "2.tar.gz"):
        (tmp_path / name).touch()
    assert list_shards([str(tmp_path)]) == [f"{tmp_path}/0.tar", f"{tmp_path}/1.TAR"]
    assert "left out 1 compressed archives ('2.tar.gz')" in caplog.text


def test_a_shard_that_the_manifest_lists_and_nobody_copied_is_missed(tmp_path: Path) -> None:
    """Silence would train on a part of the set."""
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"set/{number}.png")
    assert write_shards([str(tmp_path / "set"), str(tmp_path / "out"), "--target-size", "9KB"]) == 0
    assert len(list_shards([str(tmp_path / "out")])) == 3
    (tmp_path / "out/000001.tar").unlink()
    with pytest.raises(DataError, match=r"lacks '000001.tar' \(1 of 3 shards of its manifest"):
        list_shards([str(tmp_path / "out")])
    with pytest.raises(DataError, match="lacks '000001.tar'"):
        load_images(tmp_path / "out", (8, 8))
    assert len(list_shards([str(tmp_path / "out/*.tar")])) == 2


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x1f\x8b" + bytes(99), r"no image in 1 shards(.|\n)*compressed with gzip; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"no image in 1(.|\n)*`git lfs pull`"),
        (b"", r"no image in 1 shards(.|\n)*the file is empty"),
    ],
)
def test_a_shard_that_is_no_tar_says_what_it_is(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_index([str(path)], ["0.tar"], max_bad_share=0.001)


@pytest.mark.parametrize("shard", ["s3://bucket/0.tar", "htps://x/0.tar"])
def test_what_opens_a_url_is_asked_before_the_lanes(shard: str) -> None:
    config = DataConfig.model_validate({"sources": [{"shards": shard}], "lanes": 8})
    layout = fixed_layout(resolution=(8, 8), batch_size=8, micro_batch_size=8)
    with pytest.raises(DataError, match="nothing opens '(s3|htps):'"):
        TrainStream(config, layout)


def test_hidden_images_of_shards_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = picture(tmp_path / "a.jpg").read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "._a.jpg", ".x/b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert len(load_index([str(tmp_path / "0.tar")], ["0.tar"], max_bad_share=0.0)) == 1
    assert "0.tar': left out 2 hidden (._a.jpg, .x/b.jpg)" in caplog.text
