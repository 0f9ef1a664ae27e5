"""Every client that reads a student here, and how far what it returns is from the student.

    python -m tests.quality.clients [--student FILE] [--out DIR]

Exports a student in every format, reads each file with the library that it is for, and prints the
largest absolute difference of the map, of the summary and of the heads from the student in PyTorch,
at a square and an oblong size, beside the largest value of the map. Without `--student` it takes
two with random weights: a ViT-Ti/16 and a ConvNeXt-Atto. The images have the statistics of
photographs. A client that does not return an output has `-` in its row. Exits with code 1 if one
is beyond its limit.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor

from distill.formats.export import export_student
from distill.formats.onnx import OnnxOptions
from distill.formats.onnx_agreement import likeness
from distill.formats.onnx_graph import Outputs
from distill.formats.radio_reader import read_radio_student
from distill.runtime.errors import RecipeError
from student.config import HeadConfig, StudentConfig
from student.initial import build
from student.model import Student
from student.storage import load_student, read_student, save_student, student_of
from student.timm_config import TimmStudentConfig
from teachers.build import build_teacher, parse_teacher
from teachers.features import FeatureSpec
from tests import vllm_double
from tests.hf_client import packed

_HEAD = HeadConfig(hidden_dim=384, num_layers=1)
STUDENTS = {
    "ViT-Ti/16": StudentConfig(size="tiny", max_resolution=512, head=_HEAD),
    "ConvNeXt-Atto": TimmStudentConfig(model="convnext_atto", head=_HEAD),
}
_SHARED = {"patch_size": 16, "resolution": (224, 224), "any_resolution": True}
TARGETS = {
    "clip": FeatureSpec(summary_dim=192, spatial_dim=192, **_SHARED),
    "siglip": FeatureSpec(summary_dim=192, spatial_dim=192, **_SHARED),
}
LIBRARIES = ("torch", "timm", "transformers", "onnxruntime", "accelerate", "safetensors")
CELLS = ((14, 14), (10, 18))  # of the student's map, 224 px and more
# Name of a file to the format and the options of its export.
FILES: dict[str, tuple[str, OnnxOptions]] = {
    "student.safetensors": ("safetensors", OnnxOptions()),
    "hf": ("hf", OnnxOptions()),
    "student.pth.tar": ("radio", OnnxOptions()),
    "fp32.onnx": ("onnx", OnnxOptions()),
    "opset17.onnx": ("onnx", OnnxOptions(opset=17)),
    "fp16.onnx": ("onnx", OnnxOptions("fp16")),
    "int8.onnx": ("onnx", OnnxOptions("int8")),
    "student.pt2": ("pt2", OnnxOptions()),
}
Run = Callable[[Tensor], Mapping[str, Tensor]]
LIMITS = {"fp16.onnx": 2e-3, "int8.onnx": 0.1}  # of the largest value; of other files 1e-5


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.quality.clients")
    parser.add_argument("--student", type=Path, help="a student's file, in its teachers' spaces")
    parser.add_argument("--out", type=Path, help="keeps the files there")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES))
    students = {str(options.student): options.student} if options.student else STUDENTS
    beyond: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, source in students.items():
            folder = (options.out or Path(temporary)) / Path(name).stem.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            if not isinstance(source, Path):
                source = write_random(folder / "random.safetensors", source)
            beyond += print_table(name, source, folder)
    if beyond:
        print(f"beyond their limits: {', '.join(beyond)}")
    return 1 if beyond else 0


def write_random(path: Path, config: StudentConfig | TimmStudentConfig) -> Path:
    """A student with random weights of a fixed seed."""
    torch.manual_seed(0)
    student = build(config, TARGETS).eval()
    with torch.no_grad():
        for parameter in student.parameters():  # biases start at zero, and would hide a mistake
            parameter += 0.02 * torch.randn_like(parameter)
    metadata = {"head_space": "teacher"}
    save_student(path, student.config, student.targets, student.state_dict(), metadata)
    return path


@torch.no_grad()
def print_table(name: str, source: Path, folder: Path) -> list[str]:
    """Exports a student in every format, prints a row for every client, returns those too far."""
    student = load_student(source)
    for file, (format, onnx) in FILES.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the table says it all
                export_student(source, folder / file, format=format, onnx=onnx, force=True)
        except RecipeError as error:
            print(f"\n{error}")
    p = student.spec.patch_size
    sizes = [likeness(2, h * p, w * p) for h, w in CELLS]
    due = [Outputs(student)(images) for images in sizes]
    largest = max(float(each["spatial"].abs().max()) for each in due)
    print(f"\n{name}: values of the map up to {largest:.2g}\n")
    print("| client | file | MB | map | summary | heads |\n|---|---|---|---|---|---|")
    beyond = []
    for client, file, run in clients(folder, student):
        came = [run(images) for images in sizes]
        found = [_difference(due, came, part) for part in ("map", "summary", "heads")]
        cells = " | ".join(map(_shown, found))
        print(f"| {client} | `{file}` | {_megabytes(folder / file):.1f} | {cells} |", flush=True)
        if not all(each is None or each.relative <= LIMITS.get(file, 1e-5) for each in found):
            beyond.append(client)
    return beyond


def clients(folder: Path, student: Student) -> Iterator[tuple[str, str, Run]]:
    """The clients of the files that are there: name, file, and what returns named outputs."""
    file = folder / "student.safetensors"
    yield "`student.load`", file.name, Outputs(load_student(file))
    yield "accelerate", file.name, _accelerate(file)
    if (folder / "hf").is_dir():
        yield "`student.load`", "hf", Outputs(load_student(folder / "hf"))
        for attention in ("eager", "sdpa"):
            yield f"transformers, {attention}", "hf", _transformers(folder / "hf", attention)
        yield "transformers, packed", "hf", _transformers(folder / "hf", "sdpa", pack=True)
        yield "vLLM's reader, restated", "hf", _vllm(folder / "hf", student)
    public = folder / "student.pth.tar"
    if public.is_file():
        again = read_radio_student(public)
        model = student_of(again.config, again.targets, again.state_dict, "")
        yield "our reader of RADIO's format", public.name, Outputs(model)
        yield "`kind: radio`, timm's NaFlexVit", public.name, _radio_teacher(public)
        yield "timm's own reader of RADIO", public.name, _timm(public, student, folder)
    for name in FILES:
        if name.endswith(".onnx") and (folder / name).is_file():
            yield f"onnxruntime, {name.removesuffix('.onnx')}", name, _onnxruntime(folder / name)
    program = torch.export.load(folder / "student.pt2").module()
    yield "torch.export", "student.pt2", program


def _accelerate(path: Path) -> Run:
    from accelerate import load_checkpoint_in_model

    file = read_student(path)
    empty = {name: torch.zeros_like(value) for name, value in file.state_dict.items()}
    model = student_of(file.config, file.targets, empty, "")
    load_checkpoint_in_model(model, str(path))
    return Outputs(model)


def _transformers(folder: Path, attention: str, *, pack: bool = False) -> Run:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation=attention)

    def run(images: Tensor) -> Mapping[str, Tensor]:
        p = model.config.patch_size
        grid = images.shape[2] // p, images.shape[3] // p
        if not pack:
            out = model(images)
            return _named(out.summary, out.features, grid)
        smaller = images[:1, :, :p]  # another size in the same batch
        out = model(**packed([images[:1], smaller, images[1:]], p))
        count, wide = grid[0] * grid[1], grid[1]
        features = torch.stack([out.features[:count], out.features[count + wide :]])
        return _named(out.summary[::2], features, grid)

    return run


def _vllm(folder: Path, student: Student) -> Run:
    config = json.loads((folder / "config.json").read_text())
    loaded = vllm_double.load(folder, {config["args"]["model"]: tuple(student.config.shape)})

    def run(images: Tensor) -> Mapping[str, Tensor]:
        tokens = loaded.encode(images)
        p, skip = config["patch_size"], config["num_cls_tokens"] + config["num_registers"]
        summary = tokens[:, config["summary_idxs"]].flatten(1)
        return _named(summary, tokens[:, skip:], (images.shape[2] // p, images.shape[3] // p))

    return run


def _radio_teacher(path: Path) -> Run:
    entry = {"kind": "radio", "weights": str(path), "resolution": [224, 224]}
    teacher = build_teacher(parse_teacher(entry))
    return lambda images: teacher(images)._asdict()


def _timm(path: Path, student: Student, folder: Path) -> Run:
    import timm

    state = torch.load(path, weights_only=False)["state_dict"]
    on_hub = {f"radio_model.{k.replace('base_model.', 'model.')}": v for k, v in state.items()}
    save_file(on_hub, folder / "timm.safetensors")
    shape, config = student.config.shape, student.config
    model = timm.create_model(
        "naflexvit_so400m_patch16_radio_v4",
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        mlp_ratio=(shape.mlp_dim + 0.5) / shape.width,
        patch_size=config.patch_size,
        reg_tokens=student.num_skip - 1,
        pos_embed_grid_size=(config.table_side,) * 2,
        num_classes=0,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(folder / "timm.safetensors")},
    ).eval()
    pixels = [torch.tensor(each).view(3, 1, 1) for each in (student.mean, student.std)]

    def run(images: Tensor) -> Mapping[str, Tensor]:
        tokens = model.forward_features((images - pixels[0]) / pixels[1])
        p = config.patch_size
        grid = images.shape[2] // p, images.shape[3] // p
        summary = tokens[:, : len(student.targets)].flatten(1)
        return _named(summary, tokens[:, student.num_skip :], grid)

    return run


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]

    def run(images: Tensor) -> Mapping[str, Tensor]:
        returned = session.run(names, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, returned), strict=True))

    return run


def _named(summary: Tensor, tokens: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
    return {"summary": summary, "spatial": tokens.transpose(1, 2).unflatten(2, grid)}


class Difference(NamedTuple):
    """Of the outputs of a part: largest absolute difference, over the largest value, cosine."""

    absolute: float
    relative: float
    cosine: float


def _difference(
    due: list[Mapping[str, Tensor]], came: list[Mapping[str, Tensor]], part: str
) -> Difference | None:
    """The largest difference of a part's outputs at all sizes; None if there is none."""
    own = {"spatial": "map", "summary": "summary"}
    names = [name for name in came[0] if own.get(name, "heads") == part]
    if not names:
        return None
    pairs = [(a[name], b[name]) for a, b in zip(due, came, strict=True) for name in names]
    off = [float((a - b).abs().max()) for a, b in pairs]
    relative = [each / float(a.abs().max()) for each, (a, _) in zip(off, pairs, strict=True)]
    cosine = min(float(F.cosine_similarity(a, b, dim=1).mean()) for a, b in pairs)
    return Difference(max(off), max(relative), cosine)


def _shown(found: Difference | None) -> str:
    if found is None:
        return "-"
    cosine = f", cosine {found.cosine:.5f}" if found.relative > 1e-3 else ""
    return f"{found.absolute:.1e}{cosine}" if found.absolute else "0"


def _megabytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files) / 1e6


if __name__ == "__main__":
    sys.exit(main())
