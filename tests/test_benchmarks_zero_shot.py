"""Zero-shot classification and retrieval through a whole tiny CLIP, against open_clip's own."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.retrieval import retrieval_hit_rate

from data.errors import DataError
from distill.benchmarks.benchmark import Measurement
from distill.benchmarks.build import build_benchmark, parse_benchmark
from distill.benchmarks.classification import retrieval, text_side
from distill.benchmarks.classification.retrieval import search_ranks
from distill.benchmarks.examine import examine
from distill.evaluation.models import Pixels, PixelsConfig
from teachers.build import build_teacher, parse_teacher
from teachers.errors import TeacherError
from teachers.teacher import Teacher
from tests.class_tree import COLOURS, write_colours
from tests.tiny_clip import DIM, write_tiny_clip


def encoder(folder: Path) -> Teacher:
    return build_teacher(parse_teacher({"kind": "dfn_clip", "model": str(folder)}))


def measure(entry: dict[str, Any], model: Path, measured: Teacher | None = None) -> Measurement:
    entry = {"text": {"model": str(model)}} | entry
    benchmark = build_benchmark(parse_benchmark(entry))
    return benchmark.measure(measured or encoder(model), 0, model)


def classified(root: Path, **changes: Any) -> dict[str, Any]:
    dataset = {"kind": "class_folders", "root": str(root)}
    names = root / "names.txt"
    names.write_text("\n".join(COLOURS))
    return {"kind": "zero_shot", "dataset": dataset, "class_names": str(names)} | changes


@pytest.mark.parametrize("siglip_text", [False, True])
def test_zero_shot_is_open_clips_own(tmp_path: Path, siglip_text: bool) -> None:
    whole = write_tiny_clip(tmp_path / "clip", siglip_text=siglip_text)
    root = write_colours(tmp_path / "set")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    templates = ["a photo of a {}.", "the {}"]
    classes = open_clip.build_zero_shot_classifier(whole, tokenizer, list(COLOURS), templates)
    right, count = 0, 0
    for label, name in enumerate(COLOURS):
        for path in sorted((root / "val" / name).iterdir()):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            left = (pixels.shape[1] - 16) // 2
            image = torch.tensor(pixels[:, left : left + 16]).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                logits = whole.encode_image(image, normalize=True) @ classes
            right, count = right + int(logits.argmax() == label), count + 1
    measured = measure(classified(root, templates=templates), tmp_path / "clip")
    assert measured.metrics == {"top1": pytest.approx(100 * right / count)}
    assert 0 < right < count == measured.protocol["test_images"] == 9


def test_the_published_templates_are_open_clips(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    root = write_colours(tmp_path / "set")
    simple = measure(classified(root, templates="simple"), tmp_path / "clip")
    written = [t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    assert simple.metrics == measure(classified(root, templates=written), tmp_path / "clip").metrics


def test_a_hit_is_any_right_caption_as_torchmetrics_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(20, 4, generator=generator), dim=1)
    owner = torch.arange(20).repeat_interleave(torch.arange(20) % 5 + 1)
    noise = torch.randn(len(owner), 4, generator=generator)
    texts = F.normalize(images[owner] + noise, dim=1)
    by_image, by_text = search_ranks(images, texts, owner)
    cosine = images @ texts.T
    for k in (1, 5, 10):
        due = [retrieval_hit_rate(cosine[i], owner == i, top_k=k) for i in range(20)]
        assert [bool(r < k) for r in by_image] == [bool(d) for d in due]
        due = [
            retrieval_hit_rate(cosine[:, j], torch.arange(20) == owner[j], top_k=k)
            for j in range(len(owner))
        ]
        assert [bool(r < k) for r in by_text] == [bool(d) for d in due]
    assert 0 < (by_image < 1).sum() < 20


def test_vectors_that_are_all_equal_find_nothing() -> None:
    same = F.normalize(torch.ones(4, 3), dim=1)
    by_image, by_text = search_ranks(same, same, torch.arange(4))
    assert by_image.tolist() == by_text.tolist() == [3] * 4


def test_a_text_tower_of_another_model_is_refused(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    entry = classified(write_colours(tmp_path / "set"))
    with pytest.raises(TeacherError, match=rf"have {DIM} numbers, the encoder's summary 192; mea"):
        measure(entry, tmp_path / "clip", Pixels(PixelsConfig()))


def test_names_of_imagenet_are_for_its_thousand_classes(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    entry = classified(write_colours(tmp_path / "set"), class_names="imagenet")
    with pytest.raises(DataError, match="imagenet has 1000 classes and .* 3; give a file"):
        measure(entry, tmp_path / "clip")


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "zero_shot", "dataset": {"kind": "class_folders", "root": "/nowhere"}},
        {"kind": "retrieval", "dataset": {"kind": "coco_captions", "root": "/nowhere"}},
    ],
)
def test_missing_data_are_told_before_a_text_tower_is_downloaded(entry: dict[str, Any]) -> None:
    tower = {"model": "ViT-H-14-378-quickgelu", "weights": "dfn5b"}
    with pytest.raises(DataError, match="there is no /nowhere/.*; expected under /nowhere"):
        measure(entry | {"text": tower}, Path(), Pixels(PixelsConfig()))


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path: Path) -> None:
    entry = classified(tmp_path, templates=["a photo"], text={"model": "x"})
    with pytest.raises(TeacherError, match="expected one {} for the name of the class"):
        parse_benchmark(entry)


def test_names_of_classes_and_weights_of_the_tower_are_part_of_the_data(tmp_path: Path) -> None:
    write_tiny_clip(tmp_path / "clip")
    entry = classified(write_colours(tmp_path / "set"))
    entry["text"] = {"model": str(tmp_path / "clip")}

    def digest() -> str:
        record = examine({"it": build_benchmark(parse_benchmark(entry))}, None)["it"]
        assert record is not None
        return str(record["contents"])

    seen = [digest(), digest()]
    names = tmp_path / "set/names.txt"
    names.write_text(names.read_text().replace("blue", "another name"))
    seen.append(digest())
    (tmp_path / "clip/added.txt").write_text("other weights")
    seen.append(digest())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
    names.write_text("only one")
    with pytest.raises(DataError, match=r"benchmarks.it: .*has 1 lines and the data"):
        digest()


def test_a_tower_that_does_not_match_is_found_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_clip(tmp_path / "clip")
    entry = classified(write_colours(tmp_path / "set")) | {
        "text": {"model": str(tmp_path / "clip")}
    }
    benchmark = build_benchmark(parse_benchmark(entry))
    monkeypatch.setattr(text_side, "TextTower", lambda config: pytest.fail("read the weights"))
    benchmark.check(encoder(tmp_path / "clip"))
    with pytest.raises(TeacherError, match=rf"have {DIM} numbers, the encoder's summary 192"):
        benchmark.check(Pixels(PixelsConfig(resolution=(16, 16))))
