"""COCO's captions and the Karpathy splits, each on a tiny tree of exactly that layout."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from data.errors import DataError
from data.labelled.captions import CaptionData, CaptionLayout

TEXTS = ["one", "two", "three", "four", "five", "six"]


def layout(kind: str, root: Path, **changes: Any) -> CaptionLayout:
    adapter: TypeAdapter[CaptionLayout] = TypeAdapter(CaptionData)
    return adapter.validate_python({"kind": kind, "root": root, **changes})


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"pixels")
    return str(path)


def write_coco(root: Path, **changes: Any) -> list[str]:
    """Image 7 has six captions, listed amid those of image 3, which is second in the list."""
    stored = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"image_id": 7, "id": 0, "caption": " one\n"},
            {"image_id": 3, "id": 1, "caption": "other"},
            *({"image_id": 7, "id": i, "caption": t} for i, t in enumerate(TEXTS[1:], 2)),
        ],
    }
    path = root / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(stored | changes))
    return [touch(root / "val2017" / name) for name in ("7.jpg", "3.jpg")]


def write_karpathy(root: Path, name: str = "dataset_flickr30k.json") -> str:
    entries = [
        {"filename": f"{s}.jpg", "split": s, "sentences": [{"raw": f"{t} {s}"} for t in TEXTS]}
        for s in ("train", "test")
    ]
    (root / name).write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    return touch(root / "flickr30k-images" / "test.jpg")


def test_coco_gives_each_image_its_first_five_captions(tmp_path: Path) -> None:
    names = write_coco(tmp_path)
    images = layout("coco_captions", tmp_path).load()
    assert images.names == names
    assert images.captions == [TEXTS[:5], ["other"]]
    assert images.read(names[0]) == b"pixels"
    everything = layout("coco_captions", tmp_path, captions_per_image=None).load()
    assert everything.captions[0] == TEXTS


def test_flickr30k_reads_the_test_split_of_the_json(tmp_path: Path) -> None:
    name = write_karpathy(tmp_path)
    images = layout("karpathy_captions", tmp_path).load()
    assert (images.names, images.captions) == ([name], [[f"{t} test" for t in TEXTS[:5]]])


def test_flickr30k_reads_the_csv_alike(tmp_path: Path) -> None:
    name = touch(tmp_path / "flickr30k-images" / "a.jpg")
    with (tmp_path / "flickr.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        writer.writerow([json.dumps(['a "dog", running', "b"]), "[0]", "test", "a.jpg", 0])
        writer.writerow([json.dumps(["c"]), "[1]", "val", "b.jpg", 1])
    images = layout("karpathy_captions", tmp_path, captions="flickr.csv").load()
    assert (images.names, images.captions) == ([name], [['a "dog", running', "b"]])


def test_the_karpathy_split_of_coco_has_folders_in_it(tmp_path: Path) -> None:
    entry = {
        "filepath": "val2014",
        "filename": "1.jpg",
        "split": "test",
        "sentences": [{"raw": "x"}],
    }
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [entry]}))
    name = touch(tmp_path / "val2014" / "1.jpg")
    coco = layout("karpathy_captions", tmp_path, captions="dataset_coco.json", images=".")
    assert coco.load().names == [name]


@pytest.mark.parametrize(
    "kind, tree",
    [
        ("coco_captions", r"annotations/captions_val2017.json\n  val2017/\*.jpg"),
        ("karpathy_captions", r"dataset_flickr30k.json or .*\n  flickr30k-images/\*.jpg"),
    ],
)
def test_what_is_not_there_is_asked_for_with_its_tree(tmp_path: Path, kind: str, tree: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)there is no .*expected under .*{tree}"):
        layout(kind, tmp_path).load()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": []}, "7.jpg' has no caption"),
        (
            {"annotations": [{"id": 1}]},
            "no caption file of COCO: an entry lacks the key 'image_id'",
        ),
        ({"images": []}, "annotation 0 has image_id 7, and none of the 0 entries of images"),
        (
            {"annotations": [{"id": 5, "image_id": 7, "caption": None}]},
            "annotation 5: expected a caption of text, got None",
        ),
        ({"images": [], "annotations": []}, "no image with captions"),
    ],
)
def test_a_broken_caption_file_of_coco_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_coco(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        layout("coco_captions", tmp_path).load()


def test_an_image_that_is_missing_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "val2017" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"there is no .*3.jpg; expected"):
        layout("coco_captions", tmp_path).load()


def test_other_columns_and_no_json_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "flickr30k-images" / "a.jpg")
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,hello\n")
    with pytest.raises(DataError, match="needs the columns filename, raw, split; it has image, ca"):
        layout("karpathy_captions", tmp_path, captions="x.csv").load()
    (tmp_path / "y.csv").write_text("raw,split,filename\nhello,test,a.jpg\n")
    with pytest.raises(DataError, match="expected lists in JSON in the column raw"):
        layout("karpathy_captions", tmp_path, captions="y.csv").load()
    (tmp_path / "z.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        layout("karpathy_captions", tmp_path, captions="z.json").load()
