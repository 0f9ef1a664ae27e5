"""The card beside an exported student: what the run and the student are, and no places."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.formats.export import export_student
from distill.formats.hub_metadata import MARK
from distill.formats.model_card import model_card
from distill.formats.source import read_source
from distill.runtime.config import dump_yaml, parse_yaml
from student.storage import StudentFile
from tests.tiny_export import build, write_run

RECIPE = {
    "run": {"dir": "/home/me/runs/x", "resolution": [32, 64]},
    "data": {"sources": [{"shards": ["/data/photos/a.tar"]}]},
    "teachers": {
        "siglip": {"kind": "siglip", "model": "/models/so400m", "weights": None, "upsampler": None},
        "clip": {
            "kind": "dfn_clip",
            "model": "ViT-H-14",
            "weights": "dfn5b",
            "upsampler": {"kind": "trained", "path": "/runs/clip_3x.safetensors"},
        },
        "muted": {"kind": "mine:Teacher"},
    },
    "objective": {"standardisation": "phi_s"},
}


def file(**metadata: str) -> StudentFile:
    student = build()
    return StudentFile(student.config, student.targets, dict(student.state_dict()), metadata)


def card(**metadata: str) -> str:
    return model_card(file(**metadata), Path("out/s.safetensors"), "safetensors", None)


def rows(text: str, title: str) -> list[list[str]]:
    section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_teachers_are_told_with_their_licences() -> None:
    licences = json.dumps({"siglip": "Apache-2.0", "clip": "research only"})
    told = card(recipe=dump_yaml(RECIPE), licences=licences)
    siglip, clip, muted = rows(told, "Teachers")
    assert siglip == ["siglip", "siglip", "so400m", "-", "-", "Apache-2.0"]
    assert clip[3:] == ["dfn5b", "clip_3x.safetensors", "research only"]
    assert muted[5] == "unknown; see the source of its weights"


def test_outputs_are_told_with_their_sizes_and_space() -> None:
    training, teacher = card(), card(head_space="teacher")
    assert rows(training, "Outputs") == [
        ["backbone", "32", "16", "1", "its own"],
        ["siglip", "5", "6", "1", "standardised"],
        ["clip", "9", "8", "2", "standardised"],
        ["muted", "-", "3", "1", "standardised"],
    ]
    assert rows(teacher, "Outputs")[1][4] == "its teacher's"


def test_resolutions_recipe_and_versions_are_told_but_no_place_of_the_machine() -> None:
    text = card(recipe=dump_yaml(RECIPE), step="7", versions=json.dumps({"torch": "2.13"}))
    assert "Trained at 32 x 64 px. It takes images in [0, 1] of any height and width" in text
    assert "in multiples of 4 px; its position embeddings were learned up to 24 x 24 px" in text
    assert "distilled after 7 steps from siglip, clip, muted" in text
    assert "torch 2.13" in text
    assert not [place for place in ("/home", "/data", "/models", "/runs") if place in text]
    told = parse_yaml(text.partition("```yaml\n")[2].partition("```")[0], "the card")
    assert told["data"]["sources"][0]["shards"] == ["a.tar"]


def test_results_are_those_of_the_exported_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    (tmp_path / "evaluation").mkdir()
    figures = {"fidelity": 0.94, "spatial_cosine": 0.3, "summary_cosine": None}
    row = {"teacher": "clip", "resolution": [32, 64], "student": "trained", **figures}
    lines = [
        row | {"checkpoint": f"elsewhere/{checkpoint.name}"},
        row | {"checkpoint": f"elsewhere/{checkpoint.name}", "student": "untrained"},
        row | {"checkpoint": "elsewhere/step-00000003", "fidelity": 0.1},
    ]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (tmp_path / "evaluation/fidelity.jsonl").write_text(text)
    source = read_source(tmp_path)
    told = model_card(source.file, tmp_path / "s", "onnx", source.checkpoint)
    assert rows(told, "Results") == [["clip", "32 x 64", "0.940", "0.300", "-"]]
    assert "## Results" not in card()


def test_the_hub_reads_the_metadata_of_every_card() -> None:
    """By its own client's classes, without a network."""
    teachers = {
        "dino": {"kind": "timm", "model": "vit_base_patch14_reg4_dinov2.lvd142m", "weights": None},
        "clip": {"kind": "siglip", "model": "ViT-B-16-SigLIP-256", "weights": "webli"},
        "radio": {"kind": "radio", "model": "c-radio_v4-h", "weights": "/models/x.pth"},
        "hf": {"kind": "hf", "model": "facebook/dinov3-vitb16-pretrain-lvd1689m"},
        "of hub": {"kind": "open_clip", "model": "hf-hub:apple/MobileCLIP-B", "weights": None},
        "ours": {"kind": "student", "path": "hf://me/vit@next"},
        # Not certain what these hold.
        "file": {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "/models/x.pt"},
        "random": {"kind": "timm", "model": "vit_tiny_patch16_224", "weights": "none"},
        "local": {"kind": "hf", "model": "/models/dino", "weights": None},
        "own": {"kind": "mine:Teacher"},
    }
    shards = (
        "pipe:curl https://huggingface.co/datasets/timm/imagenet-1k-wds/resolve/main/{0..9}.tar"
    )
    sources = [{"shards": shards}, {"shards": ["/data/a.tar"]}]
    recipe = dump_yaml({**RECIPE, "teachers": teachers, "data": {"sources": sources}})
    for format, library in (("hf", "transformers"), ("safetensors", MARK), ("onnx", "onnx")):
        text = model_card(file(recipe=recipe), Path("out/vit"), format, None)
        data = ModelCard(text).data
        assert (data.library_name, data.pipeline_tag) == (library, "image-feature-extraction")
        assert data.license == "other"
        assert {"vision", "distillation", MARK} <= set(data.tags)
        assert ("radio" in data.tags) == (format == "hf")
        assert data.datasets == ["timm/imagenet-1k-wds"]
        assert data.base_model == [
            "apple/MobileCLIP-B",
            "facebook/dinov3-vitb16-pretrain-lvd1689m",
            "me/vit",
            "nvidia/C-RADIOv4-H",
            "timm/ViT-B-16-SigLIP-256",
            "timm/vit_base_patch14_reg4_dinov2.lvd142m",
        ]


def test_results_are_a_model_index_of_the_hub(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    (tmp_path / "evaluation").mkdir()
    row = {"teacher": "clip", "student": "trained", "checkpoint": checkpoint.name}
    figures = {"fidelity": 0.94, "spatial_cosine": 0.3, "summary_cosine": None}
    lines = [{**row, **figures, "resolution": size} for size in ([32, 64], [64, 64])]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (tmp_path / "evaluation/fidelity.jsonl").write_text(text)
    source = read_source(tmp_path)
    data = ModelCard(model_card(source.file, tmp_path / "s", "onnx", source.checkpoint)).data
    found = [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results]
    assert found == [
        (f"held-out images at {size} px", metric, value)
        for size in ("32 x 64", "64 x 64")
        for metric, value in (("fidelity", 0.94), ("spatial_cosine", 0.3))
    ]
    assert data.eval_results[0].metric_name == "fidelity to clip"
    assert data.eval_results[0].task_type == "image-feature-extraction"
    assert ModelCard(card()).data.eval_results is None


def test_scores_of_the_student_and_of_its_graph_are_told(tmp_path: Path) -> None:
    """Suites whose folder is in `evaluation` of the run; of heads and other runs nothing."""
    checkpoint = write_run(tmp_path / "mine", build())
    suite = tmp_path / "mine/evaluation/camvid"
    suite.mkdir(parents=True)
    student = {"kind": "student", "path": "elsewhere/mine", "head": None, "untrained": False}
    graph = {"kind": "onnx", "path": "out/int8.onnx", "head": None}
    lines = [
        (student, 40.0),
        (student, 42.0),  # of another seed
        (student | {"path": f"elsewhere/{checkpoint.name}", "head": "clip"}, 1.0),
        (student | {"path": "elsewhere/other"}, 2.0),
        (student | {"untrained": True}, 3.0),
        (graph, 40.5),
        (graph | {"path": "out/fp16.onnx"}, 4.0),
        ({"kind": "timm", "model": "x"}, 5.0),
    ]
    rows_of = [
        {"benchmark": "camvid", "encoder": encoder, "figures": {"mIoU": value}}
        for encoder, value in lines
    ]
    (suite / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows_of))
    source = read_source(tmp_path / "mine")
    told = model_card(source.file, tmp_path / "int8.onnx", "onnx", source.checkpoint)
    assert rows(told, "Benchmarks") == [
        ["camvid", "the student", "mIoU", "41"],
        ["camvid", "this file", "mIoU", "40.5"],
    ]


@pytest.mark.parametrize("format", ["safetensors", "radio"])
def test_every_format_has_its_card_with_the_line_that_loads_it(tmp_path: Path, format: str) -> None:
    export_student(write_run(tmp_path, build()), tmp_path / "s", format=format, heads=("clip",))
    text = (tmp_path / "s.md").read_text()
    assert text.startswith("---\nlibrary_name: featsharp-distill\n")
    assert ("student.load('s')" in text) == (format == "safetensors")
    assert ("adaptor_names=['clip']" in text) == (format == "radio")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ({"siglip": "Apache-2.0", "clip": "Apache-2.0", "muted": "Apache-2.0"}, "apache-2.0"),
        (
            {
                "siglip": "Apache-2.0; assuming that /models/s.pt holds the published weights",
                "clip": "Apache-2.0; of its teachers: a, Apache-2.0; b, Apache-2.0",
                "muted": "random weights, no licence",
            },
            "apache-2.0",
        ),
        ({"siglip": "Apache-2.0", "clip": "Apache-2.0", "muted": "MIT"}, "other"),
        ({"siglip": "Apache-2.0", "clip": "Apache-2.0"}, "other"),
        (
            {
                "siglip": "Apache-2.0",
                "clip": "Apache-2.0; of its teachers: a, Apache-2.0; b, research only",
                "muted": "Apache-2.0",
            },
            "other",
        ),
        ({}, "other"),
    ],
)
def test_the_hub_is_told_the_licence_if_all_teachers_have_that_of_this_code(
    licences: dict[str, str], expected: str
) -> None:
    told = card(recipe=dump_yaml(RECIPE), licences=json.dumps(licences))
    front = parse_yaml(told.split("---\n")[1], "the card")
    assert front["license"] == expected
    assert "/models" not in told


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("local-dir:/home/me/models/clip", "local-dir:clip"),
        ("where /home/me/x.pt came from", "where x.pt came from"),
        ("~/models/x.pt", "x.pt"),
        ("/home/me/my models/x.pt", "x.pt"),
        ("pipe:cat /home/me/{000..009}.tar", "pipe:cat {000..009}.tar"),
        ("file:///home/me/x.tar", "file://x.tar"),
        ("https://huggingface.co/timm/x", "https://huggingface.co/timm/x"),
        ("s3://bucket/x.tar", "s3://bucket/x.tar"),
        ("timm/ViT-B-16", "timm/ViT-B-16"),
        ("hf-hub:timm/x", "hf-hub:timm/x"),
    ],
)
def test_a_place_of_the_machine_is_cut_wherever_it_stands(place: str, told: str) -> None:
    recipe = {**RECIPE, "teachers": {"siglip": {"kind": "x", "model": place, "weights": None}}}
    text = card(recipe=dump_yaml(recipe))
    assert rows(text, "Teachers")[0][2] == told
    assert "/home" not in text


def test_all_sizes_of_a_schedule_are_told() -> None:
    sizes = [{"size": [32, 32], "end": 5}, {"size": [48, 64], "start": 5}]
    arms = {"arms": {"low": {"resolution": 32}, "high": {"resolution": sizes}}}
    text = card(recipe=dump_yaml({**RECIPE, "run": {"dir": "x"}, **arms}))
    assert "Trained at 32 x 32 and 48 x 64 px. It takes" in text
    assert "Trained at 48 x 64 px. It takes" in card(resolution="[48, 64]")
