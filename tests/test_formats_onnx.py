"""The ONNX graph: one for every batch, height and width, equal to PyTorch under onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from distill.formats import onnx as export_onnx
from distill.formats.export import export_student
from distill.formats.onnx import save_onnx
from distill.runtime.errors import RecipeError
from student.storage import load_student
from tests.tiny_export import build, export, outputs, write_run

# Of a position table of 6 x 6 cells: smaller, equal, larger, wide, tall, one cell.
SIZES = [(2, 8, 20), (1, 24, 24), (3, 40, 40), (1, 4, 40), (2, 32, 12), (1, 4, 4)]


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, exported in two formats."""
    folder = tmp_path_factory.mktemp("onnx")
    student = build()
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    checkpoint = write_run(folder, student)
    export(checkpoint, folder / "s.safetensors")
    export_student(checkpoint, folder / "s.onnx", format="onnx")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_one_graph_returns_what_the_student_does_at_every_size(
    exported: Path, size: tuple[int, int, int]
) -> None:
    images = torch.rand(size[0], 3, *size[1:])
    graph = session(exported / "s.onnx")
    names = [output.name for output in graph.get_outputs()]
    actual = dict(zip(names, graph.run(None, {"images": images.numpy()}), strict=True))
    expected = outputs(load_student(exported / "s.safetensors"), images)
    flat = {n.replace("backbone/", "").replace("/", "_"): value for n, value in expected.items()}
    assert list(actual) == list(flat)
    for name, value in flat.items():
        torch.testing.assert_close(torch.from_numpy(actual[name]), value, atol=1e-4, rtol=0)


@pytest.mark.long
def test_inputs_and_outputs_have_names_and_free_sizes(exported: Path) -> None:
    graph = session(exported / "s.onnx")
    (images,) = graph.get_inputs()
    assert (images.name, images.shape[1]) == ("images", 3)
    assert all(isinstance(images.shape[axis], str) for axis in (0, 2, 3))
    shapes = {output.name: output.shape[1:2] for output in graph.get_outputs()}
    expected = {"summary": [32], "spatial": [16], "siglip_summary": [5], "siglip_spatial": [6]}
    expected |= {"clip_summary": [9], "clip_spatial": [8], "muted_spatial": [3]}
    assert shapes == expected


@pytest.mark.long
def test_one_head_in_its_teachers_space(exported: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"heads": ("siglip",), "teacher_space": True}
    folded = export(exported, tmp_path / "s", **options)
    export_student(exported, tmp_path / "s.onnx", format="onnx", **options)
    images = torch.rand(1, 3, 12, 8)
    (actual,) = session(tmp_path / "s.onnx").run(["siglip_spatial"], {"images": images.numpy()})
    expected = outputs(folded, images)["siglip/spatial"]
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=0)
    names = [output.name for output in session(tmp_path / "s.onnx").get_outputs()]
    assert names == ["summary", "spatial", "siglip_summary", "siglip_spatial"]


@pytest.mark.long
def test_the_graph_names_no_place_of_this_machine(exported: Path) -> None:
    graph = onnx.load(exported / "s.onnx")
    assert not [node for node in graph.graph.node if node.metadata_props]
    assert str(Path(__file__).parent.parent).encode() not in (exported / "s.onnx").read_bytes()


@pytest.mark.long
def test_a_graph_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_onnx, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"of the graph is .* off at \(24, 24\) px"):
        save_onnx(tmp_path / "s.onnx", build())
    assert not list(tmp_path.iterdir())


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RecipeError, match=r"pip install 'featsharp-distill\[onnx\]'"):
        save_onnx(tmp_path / "s.onnx", build())
