"""A student that is a network of timm in other programs: ONNX, torch.export, timm; no RADIO."""

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor

from distill.formats.export import export_student
from distill.formats.onnx import OnnxOptions
from distill.formats.onnx_graph import OPSETS
from distill.runtime.errors import RecipeError
from student.config import HeadConfig
from student.model import Student
from student.storage import load_student
from student.timm_config import TimmStudentConfig
from tests.tiny_export import TARGETS, export, outputs, write_run


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    head = HeadConfig(hidden_dim=12, num_layers=1)
    made = Student(TimmStudentConfig(model="test_resnet", head=head), TARGETS)
    made.train()(torch.rand(4, 3, 96, 64))  # moves the running statistics
    return made.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, student: Student) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), student)


def flat(student: Student, images: Tensor) -> dict[str, Tensor]:
    found = outputs(student, images)
    return {name.replace("backbone/", "").replace("/", "_"): v for name, v in found.items()}


@pytest.mark.long
@pytest.mark.parametrize("opset", OPSETS)
def test_one_onnx_graph_takes_every_multiple_of_the_stride(
    checkpoint: Path, student: Student, tmp_path: Path, opset: int
) -> None:
    options = OnnxOptions(opset=opset)
    export_student(checkpoint, tmp_path / "s.onnx", format="onnx", onnx=options)
    graph = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in graph.get_outputs()]
    for batch, height, width in ((1, 64, 64), (3, 96, 160), (2, 32, 32)):
        images = torch.rand(batch, 3, height, width)
        expected = flat(student, images)
        assert names == list(expected)
        for name, value in zip(names, graph.run(None, {"images": images.numpy()}), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(value), expected[name], atol=3e-6, rtol=0, msg=name
            )


@pytest.mark.long
def test_torch_export_gives_one_program_for_sizes_of_several_cells(student: Student) -> None:
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    sizes = ({0: batch, 2: 32 * height, 3: 32 * width},)
    program = torch.export.export(student, (torch.rand(2, 3, 96, 128),), dynamic_shapes=sizes)
    images = torch.rand(3, 3, 64, 160)
    output = program.module()(images)
    torch.testing.assert_close(output.backbone.spatial, student(images).backbone.spatial)


def test_an_exported_file_without_heads_is_timms_network(
    checkpoint: Path, student: Student, tmp_path: Path
) -> None:
    exported = export(checkpoint, tmp_path / "s.safetensors", heads=())
    assert len(exported.heads) == 0
    images = torch.rand(2, 3, 64, 96)
    assert torch.equal(exported(images).backbone.spatial, student(images).backbone.spatial)
    plain = timm.create_model("test_resnet", num_classes=0).eval()
    plain.load_state_dict(exported.trunk.network.state_dict())
    summary = plain((images - 0.5) / 0.5)
    torch.testing.assert_close(summary, exported(images).backbone.summary)


def test_heads_can_return_their_teachers_space(
    checkpoint: Path, student: Student, tmp_path: Path
) -> None:
    options = {"heads": ("siglip", "clip"), "teacher_space": True}
    folded = export(checkpoint, tmp_path / "s.safetensors", **options)
    images = torch.rand(1, 3, 64, 64)
    # Of patches of 14 and 16 px under a stride of 32: twice as dense.
    assert folded(images).heads["siglip"].spatial.shape == (1, 6, 4, 4)
    assert not torch.equal(
        folded(images).heads["siglip"].spatial, student(images).heads["siglip"].spatial
    )
    assert load_student(tmp_path / "s.safetensors").config.head.upsample["clip"] == 2


def test_the_card_tells_the_network_and_its_strides(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "s.safetensors")
    card = (tmp_path / "s.safetensors.md").read_text()
    assert "timm's `test_resnet`, whose map is that of level 4 of 0 to 4" in card
    assert "strides 2, 4, 8, 16, 32" in card
    assert "in multiples of 32 px. It normalises" in card
    assert "position" not in card
    assert "| backbone | 96 | 96 | 1 | its own |" in card
    assert "| clip | 9 | 8 | 2 | standardised |" in card


def test_radios_format_is_refused_by_the_kind(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--format radio: .*student.kind: vit.*test_resnet"):
        export_student(checkpoint, tmp_path / "s.pth.tar", format="radio", heads=("clip",))
    assert not (tmp_path / "s.pth.tar").exists()
