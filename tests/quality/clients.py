"""How far each client of an exported student is from the student in PyTorch, in one table.

    OMP_NUM_THREADS=1 python -m tests.quality.clients

A small student with random weights of a fixed seed is exported in every format, and each file is
read by its real client: onnxruntime, torch.export, accelerate, transformers (eager, sdpa, and
packed images of several sizes), our reader of RADIO's format, and timm's network with its weights.
The images are like photographs, square and oblong. Prints the largest absolute difference of the
map, the summary and the heads, and the size of the file; `-` where a client has no such output.
Exits with code 1 if one is beyond its limit.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import student as package
from distill.formats.export import export_student
from distill.formats.onnx import OnnxOptions
from distill.formats.onnx_agreement import likeness, open_session
from distill.formats.onnx_graph import IMAGES, Outputs
from distill.formats.radio_reader import read_radio_student
from student.config import HeadConfig, StudentConfig
from student.model import Student
from student.storage import save_student, student_of
from teachers.build import build_teacher, parse_teacher
from teachers.features import FeatureSpec
from tests.hf_client import packed

TARGETS = {
    "clip": FeatureSpec(summary_dim=512, spatial_dim=768, patch_size=16, resolution=(224, 224)),
    "dino": FeatureSpec(summary_dim=384, spatial_dim=384, patch_size=14, resolution=(224, 224)),
}
SIZES = ((96, 96), (64, 160))
LIMITS = {"float16": 0.05, "integers": 0.5}  # absolute; every other client: 1e-5

Named = dict[str, Tensor]  # of `onnx_graph.Outputs`
Client = Callable[[Tensor], Named]


class Row(NamedTuple):
    """A client, its file and how it encodes images."""

    name: str
    file: Path
    run: Client


def build() -> Student:
    """A student of 6 blocks whose weights are not those of initialisation, whose biases are 0."""
    torch.manual_seed(0)
    head = HeadConfig(hidden_dim=192, num_layers=1)
    config = StudentConfig(size="tiny", depth=6, max_resolution=256, head=head, final_norm=False)
    model = Student(config, TARGETS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return model


def rows(folder: Path, model: Student) -> Iterator[Row]:
    """Exports a student in every format and opens each file by its clients."""
    source, space = folder / "student.safetensors", {"head_space": "teacher"}
    save_student(source, model.config, model.targets, model.state_dict(), space)
    yield Row("student.load", source, Outputs(package.load(source)))
    yield Row("accelerate", source, _accelerate(source))
    yield from _transformers(_exported(source, folder / "hf", "hf"))
    radio = _exported(source, folder / "student.pth.tar", "radio")
    yield Row("RADIO's format, our reader", radio, _radio(radio))
    yield Row("RADIO's format, timm's network", radio, _timm(radio))
    program = _exported(source, folder / "student.pt2", "pt2")
    yield Row("torch.export", program, torch.export.load(program).module())
    options = [("fp32", 20), ("fp32", 17), ("fp16", 20), ("int8", 20)]
    for precision, opset in options:
        out = folder / f"{precision}-{opset}.onnx"
        export_student(source, out, format="onnx", onnx=OnnxOptions(precision, opset))
        yield Row(f"onnxruntime {precision}, opset {opset}", out, _onnxruntime(out, model))


def _exported(source: Path, out: Path, format: str) -> Path:
    export_student(source, out, format=format)
    return out


def _accelerate(path: Path) -> Client:
    from accelerate import load_checkpoint_in_model

    other = build()
    for parameter in other.parameters():
        parameter.zero_()
    load_checkpoint_in_model(other, str(path))
    return Outputs(other)


def _transformers(folder: Path) -> Iterator[Row]:
    from transformers import AutoModel

    for attention in ("eager", "sdpa"):
        network = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
        p = network.config.patch_size

        def run(images: Tensor, network: Any = network, p: int = p) -> Named:
            return _named(network(images), images, p)

        def run_packed(images: Tensor, network: Any = network, p: int = p) -> Named:
            other = likeness(1, 2 * p, 3 * p)  # of another size, between the images
            batch = [part for each in images.split(1) for part in (each, other)]
            out = network(**packed(batch, p))
            counts = [each.shape[2] // p * (each.shape[3] // p) for each in batch]
            maps = out.features.split(counts)[::2]
            out.features, out.summary = torch.stack(list(maps)), out.summary[::2]
            return _named(out, images, p)

        yield Row(f"transformers, {attention}", folder / "model.safetensors", run)
        yield Row(f"transformers, {attention}, packed", folder / "model.safetensors", run_packed)


def _named(out: Any, images: Tensor, p: int) -> Named:
    grid = images.shape[2] // p, images.shape[3] // p
    return {"summary": out.summary, "spatial": out.features.transpose(1, 2).unflatten(2, grid)}


def _radio(path: Path) -> Client:
    file = read_radio_student(path)
    return Outputs(student_of(file.config, file.targets, file.state_dict, str(path)))


def _timm(path: Path) -> Client:
    entry = {"kind": "radio", "weights": str(path), "resolution": [96, 96]}
    teacher = build_teacher(parse_teacher(entry))

    def run(images: Tensor) -> Named:
        features = teacher(images)
        assert features.summary is not None
        return {"summary": features.summary, "spatial": features.spatial}

    return run


def _onnxruntime(path: Path, model: Student) -> Client:
    session, names = open_session(path), list(Outputs(model)(likeness(1, 32, 32)))

    def run(images: Tensor) -> Named:
        came = session.run(names, {IMAGES: images.numpy()})
        return {name: torch.from_numpy(each) for name, each in zip(names, came, strict=True)}

    return run


def differences(model: Student, run: Client) -> dict[str, float | None]:
    """The largest absolute difference of map, summary and heads; None for what is not returned."""
    found: dict[str, float | None] = {"map": None, "summary": None, "heads": None}
    for size in SIZES:
        images = likeness(2, *size)
        came = run(images)
        for name, value in Outputs(model)(images).items():
            if name in came:
                column = {"spatial": "map", "summary": "summary"}.get(name, "heads")
                off = float((came[name] - value).abs().max())
                found[column] = max(found[column] or 0.0, off)
    return found


def limit(name: str) -> float:
    """What a client may differ by."""
    if "fp16" in name:
        return LIMITS["float16"]
    return LIMITS["integers"] if "int8" in name else 1e-5


@torch.no_grad()
def main() -> int:
    """The command."""
    model, wrong = build(), []
    table = Table("client", title="Largest absolute difference from the student in PyTorch")
    for name in ("map", "summary", "heads", "MB"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), model):
            found = differences(model, row.run)
            cells = ["-" if each is None else f"{each:.1e}" for each in found.values()]
            table.add_row(row.name, *cells, f"{row.file.stat().st_size / 1e6:.1f}")
            if not max(each for each in found.values() if each is not None) <= limit(row.name):
                wrong.append(row.name)
    Console(width=110).print(table)
    if wrong:
        print(f"beyond their limits: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
