"""The ONNX file: one for every batch, height and width, in three precisions, and what it says."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from distill.formats import onnx as export_onnx
from distill.formats.export import export, export_student
from distill.formats.onnx import OnnxOptions, save_onnx
from distill.formats.onnx_agreement import BOUNDS, Bound, Difference, likeness, missed
from distill.formats.onnx_graph import IMAGES, OPSETS, write_graph
from distill.formats.onnx_metadata import write_metadata
from distill.formats.onnx_precision import LEVELS, PRECISIONS, Precision, convert
from distill.runtime.errors import AgreementError, RecipeError
from student.model import Student
from student.storage import StudentFile, load_student
from tests.tiny_export import build, outputs, write_run
from tests.tiny_export import export as export_safetensors

# Of a position table of 6 x 6 cells: smaller, equal, larger, wide, tall, one cell.
SIZES = [(2, 8, 20), (1, 24, 24), (3, 40, 40), (1, 4, 40), (2, 32, 12), (1, 4, 4)]
LICENCES = {"siglip": "Apache-2.0", "clip": "research only"}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def student() -> Student:
    model = build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def file_of(model: Student, **metadata: str) -> StudentFile:
    return StudentFile(model.config, model.targets, dict(model.state_dict()), metadata)


def flat(model: Student, images: Tensor) -> dict[str, Tensor]:
    named = outputs(model, images)
    return {n.replace("backbone/", "").replace("/", "_"): value for n, value in named.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `student()`, exported as safetensors."""
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint = write_run(folder, student())
    export_safetensors(checkpoint, folder / "s.safetensors")
    return folder


@pytest.fixture(scope="module")
def traced(folder: Path) -> Callable[[int], Path]:
    """The graph of `student()` in float32, by opset: torch's exporter takes seconds."""

    def graph(opset: int) -> Path:
        path = folder / f"opset-{opset}" / "graph.onnx"
        if not path.exists():
            path.parent.mkdir()
            write_graph(path, load_student(folder / "s.safetensors").float(), opset)
        return path

    return graph


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch, traced: Callable[[int], Path]) -> None:
    """Exports take the graph of `student()`, whatever is exported."""

    def copy(path: Path, model: Student, opset: int) -> None:
        shutil.copy(traced(opset), path)

    monkeypatch.setattr(export_onnx, "write_graph", copy)


@pytest.fixture(scope="module")
def exported(folder: Path, traced: Callable[[int], Path]) -> dict[tuple[str, int], Path]:
    """A file for each precision and opset."""
    files: dict[tuple[str, int], Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_onnx, "write_graph", lambda to, _, op: shutil.copy(traced(op), to))
        for opset in OPSETS:
            for precision in PRECISIONS:
                out = folder / f"{precision}-{opset}.onnx"
                export_student(folder, out, format="onnx", onnx=OnnxOptions(precision, opset))
                files[precision, opset] = out
    return files


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_one_graph_returns_what_the_student_does_at_every_size(
    folder: Path, exported: dict[tuple[str, int], Path], size: tuple[int, int, int]
) -> None:
    images = torch.rand(size[0], 3, *size[1:])
    expected = flat(load_student(folder / "s.safetensors"), images)
    for opset in OPSETS:
        graph = session(exported["fp32", opset])
        names = [output.name for output in graph.get_outputs()]
        assert names == list(expected)
        for name, value in zip(names, graph.run(None, {IMAGES: images.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[name], atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_output_of_every_precision_agrees_on_other_images_than_were_compared(
    folder: Path, exported: dict[tuple[str, int], Path], precision: str, opset: int
) -> None:
    graph = onnx.load(exported[precision, opset])
    onnx.checker.check_model(graph, full_check=True)
    assert {each.domain: each.version for each in graph.opset_import}[""] == opset
    running, model = session(exported[precision, opset]), load_student(folder / "s.safetensors")
    for height, width in ((24, 24), (12, 40), (28, 16)):
        images = likeness(2, height, width, seed=5)
        due = flat(model, images)
        found = running.run(None, {IMAGES: images.numpy()})
        for value, came in zip(due.values(), found, strict=True):
            off, other = torch.from_numpy(came) - value, torch.from_numpy(came)
            assert other.dtype == torch.float32
            if precision == "fp32":
                assert off.abs().max() <= 3e-6
            elif precision == "fp16":
                assert 0 < off.norm() <= 2e-3 * value.norm()
            else:
                assert torch.cosine_similarity(other, value, dim=1).mean() >= 0.999
                assert off.abs().max() > 1e-5  # else nothing was quantised


@pytest.mark.long
def test_inputs_and_outputs_have_names_and_free_sizes(
    exported: dict[tuple[str, int], Path],
) -> None:
    for path in exported.values():
        graph = session(path)
        (images,) = graph.get_inputs()
        assert (images.name, images.type) == ("images", "tensor(float)")
        assert images.shape == ["batch", 3, "height", "width"]
        assert {output.name: output.shape for output in graph.get_outputs()} == {
            "summary": ["batch", 32],
            "spatial": ["batch", 16, "rows", "columns"],
            "siglip_summary": ["batch", 5],
            "siglip_spatial": ["batch", 6, "rows", "columns"],
            "clip_summary": ["batch", 9],
            "clip_spatial": ["batch", 8, "2*rows", "2*columns"],
            "muted_spatial": ["batch", 3, "rows", "columns"],
        }


@pytest.mark.long
@pytest.mark.parametrize("size", [(13, 16), (16, 18)])
def test_a_size_that_is_no_multiple_of_the_patch_fails_with_a_sentence(
    exported: dict[tuple[str, int], Path], size: tuple[int, int]
) -> None:
    rule = "the height and the width of `images` must be multiples of 4 pixels"
    for path in exported.values():
        with pytest.raises(Exception, match=rule):
            session(path).run(None, {IMAGES: np.zeros((1, 3, *size), np.float32)})


@pytest.mark.long
def test_a_file_says_all_that_a_deployer_needs(
    folder: Path, tmp_path: Path, untraced: None
) -> None:
    recipe = "run: {resolution: [32, 64]}\n"
    facts = {"licences": json.dumps(LICENCES), "recipe": recipe, "step": "7"}
    file = file_of(load_student(folder / "s.safetensors"), **facts)
    agreement = save_onnx(tmp_path / "s.onnx", file, OnnxOptions("int8", 17))
    told = session(tmp_path / "s.onnx").get_modelmeta().custom_metadata_map
    told = {key: json.loads(value) if value[0] in "[{" else value for key, value in told.items()}
    assert (told["precision"], told["opset"], told["integers"]) == ("int8", "17", LEVELS[0])
    assert (told["patch_size"], told["resolution"], told["step"]) == ("4", [32, 64], "7")
    assert told["teachers"] == LICENCES | {"muted": None}
    assert told["license"] == "other"
    assert told["mean"] == list(file.config.mean or ())
    assert told["std"] == list(file.config.std or ())
    assert told["version"]
    axes = ["batch", "channels", "height", "width"]
    assert told["input"] == {
        **{"name": "images", "dtype": "float32", "axes": axes, "colours": "RGB", "range": [0, 1]}
    }
    assert told["outputs"]["clip_spatial"] == {
        "axes": ["batch", "channels", "rows", "columns"],
        **{"channels": 8, "head": "clip", "pixels_per_cell": 2.0, "space": "standardised"},
    }
    assert told["outputs"]["clip_summary"]["space"] == "teacher"
    assert told["outputs"]["summary"]["head"] is None
    assert told["agreement"]["sizes"] == [[24, 24], [16, 36], [56, 56]]
    assert told["agreement"]["outputs"]["spatial"] == agreement.outputs["spatial"]._asdict()


@pytest.mark.long
def test_the_agreement_is_printed_and_in_the_card(
    folder: Path, tmp_path: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = OnnxOptions("fp16", 20)
    export_student(folder, tmp_path / "s.onnx", format="onnx", onnx=options)
    printed, card = capsys.readouterr().out, (tmp_path / "s.onnx.md").read_text()
    assert "onnxruntime and PyTorch, fp16: relative difference at most 0.002" in printed
    assert "fp16, opset 20, run by onnxruntime on a CPU, on 24 x 24, 16 x 36, 56 x 56 px." in card
    for name in ("summary", "clip_spatial"):
        (line,) = [each for each in printed.splitlines() if each.startswith(f"  {name}: ")]
        (row,) = [each for each in card.splitlines() if each.startswith(f"| {name} | ")]
        for figure in row.strip("| ").split(" | ")[1:]:
            assert figure in line


@pytest.mark.long
def test_one_head_in_its_teachers_space(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"heads": ("siglip",), "teacher_space": True}
    folded = export_safetensors(folder, tmp_path / "s", **options)
    export_student(folder, tmp_path / "s.onnx", format="onnx", **options)
    images = torch.rand(1, 3, 12, 8)
    graph = session(tmp_path / "s.onnx")
    (actual,) = graph.run(["siglip_spatial"], {IMAGES: images.numpy()})
    expected = outputs(folded, images)["siglip/spatial"]
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-4, rtol=0)
    names = [output.name for output in graph.get_outputs()]
    assert names == ["summary", "spatial", "siglip_summary", "siglip_spatial"]
    told = json.loads(graph.get_modelmeta().custom_metadata_map["outputs"])
    assert told["siglip_spatial"]["space"] == "teacher"


@pytest.mark.long
def test_the_graph_names_no_place_of_this_machine(exported: dict[tuple[str, int], Path]) -> None:
    for path in exported.values():
        assert not [node for node in onnx.load(path).graph.node if node.metadata_props]
        assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()


@pytest.mark.long
def test_a_graph_that_misses_its_bound_is_told_with_its_figure_and_not_written(
    folder: Path, tmp_path: Path, untraced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(load_student(folder / "s.safetensors"))
    for precision in PRECISIONS:
        figure = BOUNDS[precision].figure
        never = Bound(figure, 1.0001 if figure == "cosine" else 0.0)
        monkeypatch.setitem(BOUNDS, precision, never)
        with pytest.raises(AgreementError, match=rf"{precision}: `\w+` of the graph .*{figure} "):
            save_onnx(tmp_path / "s.onnx", file, OnnxOptions(precision, 20))
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_fewer_linears_multiply_integers_where_the_bound_asks_for_it(
    folder: Path, tmp_path: Path, untraced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(load_student(folder / "s.safetensors"))
    counts = []
    for limit in (0.99, 0.9999):
        monkeypatch.setitem(BOUNDS, "int8", Bound("cosine", limit))
        agreement = save_onnx(tmp_path / "s.onnx", file, OnnxOptions("int8", 20))
        entries = session(tmp_path / "s.onnx").get_modelmeta().custom_metadata_map
        assert entries["integers"] == LEVELS[agreement.level]
        counts.append(_count(tmp_path / "s.onnx", "MatMulInteger"))
    assert counts[0] > counts[1]


def _count(path: Path, operator: str) -> int:
    return sum(node.op_type == operator for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("level", "integers"), list(enumerate([4, 2, 1, 0]))
)  # all; not fc2 and last; not fc1 either; none
def test_a_level_says_which_linears_multiply_integers(
    tmp_path: Path, level: int, integers: int
) -> None:
    convert(_hand_made(tmp_path / "g.onnx"), tmp_path / "out.onnx", "int8", level)
    assert _count(tmp_path / "out.onnx", "MatMulInteger") == integers
    assert _largest_difference(tmp_path / "g.onnx", tmp_path / "out.onnx") < 0.05


def _hand_made(path: Path, width: int = 64) -> Path:
    """Two linears, of which one is a Gemm, around GELUs and sums, and a convolution."""
    draw = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    def tensor(name: str, value: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(value, name)

    nodes = [
        helper.make_node("Conv", [IMAGES, "kernel"], ["c"], name="conv", strides=[4, 4]),
        helper.make_node("ReduceMean", ["c", "axes"], ["x"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["x", "qkv"], ["a"], name="qkv"),
        helper.make_node("LayerNormalization", ["a", "scale"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "fc1"], ["b"], name="fc1"),
        helper.make_node("Add", ["b", "bias"], ["d"], name="add"),
        helper.make_node("Gelu", ["d"], ["e"], name="gelu"),
        helper.make_node("MatMul", ["e", "fc2"], ["f"], name="fc2"),
        helper.make_node("Add", ["f", "a"], ["h"], name="residual"),
        helper.make_node("LayerNormalization", ["h", "scale"], ["i"], name="norm2"),
        helper.make_node("Gelu", ["i"], ["j"], name="gelu2"),
        helper.make_node("Gemm", ["j", "last", "bias"], ["out"], name="last", transB=1),
    ]
    stored = [
        tensor("kernel", weight(width, 3, 4, 4)),
        tensor("axes", np.array([2, 3], np.int64)),
        *(tensor(name, weight(width, width)) for name in ("qkv", "fc1", "fc2", "last")),
        tensor("bias", weight(width)),
        tensor("scale", np.ones(width, np.float32)),
    ]
    shape: list[str | int] = ["batch", 3, "height", "width"]
    given = helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, shape)
    found = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", width])
    graph = helper.make_graph(nodes, "hand_made", [given], [found], stored)
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def _largest_difference(one: Path, other: Path) -> float:
    images = likeness(4, 16, 24).numpy()
    first, second = (session(each).run(None, {IMAGES: images})[0] for each in (one, other))
    return float(np.abs(first - second).max() / np.abs(first).max())


@pytest.mark.parametrize(
    ("precision", "share", "off"), [("fp16", 0.52, 2e-3), ("int8", 0.28, 0.05)]
)
def test_files_are_a_half_and_a_quarter_as_large(
    tmp_path: Path, precision: Precision, share: float, off: float
) -> None:
    """Whatever computes with the weights: linears, convolutions, tables."""
    path = _hand_made(tmp_path / "g.onnx", width=256)
    for level in range(len(LEVELS) if precision == "int8" else 1):
        convert(path, tmp_path / "out.onnx", precision, level)
        sizes = [each.stat().st_size for each in (tmp_path / "out.onnx", path)]
        assert sizes[0] < share * sizes[1]
        assert 0 < _largest_difference(path, tmp_path / "out.onnx") < off


def test_integers_do_not_saturate_where_all_values_are_large(tmp_path: Path) -> None:
    """A sum of two products of signed bytes overflows in kernels of processors without VNNI."""
    path = _hand_made(tmp_path / "g.onnx")
    model = onnx.load(path)
    for each in model.graph.initializer:
        if each.name in ("qkv", "fc1", "fc2", "last"):
            value = np.abs(numpy_helper.to_array(each))
            each.CopyFrom(numpy_helper.from_array(value.clip(0.1, None), each.name))
    onnx.save(model, path)
    convert(path, tmp_path / "out.onnx", "int8")
    assert _largest_difference(path, tmp_path / "out.onnx") < 0.02
    stored = {
        each.name: each.data_type for each in onnx.load(tmp_path / "out.onnx").graph.initializer
    }
    assert {stored[name] for name in stored if name.endswith("_quantized")} == {TensorProto.UINT8}


@pytest.mark.long
def test_in_half_precision_pixels_norms_and_softmax_stay_float32(
    exported: dict[tuple[str, int], Path],
) -> None:
    for opset in OPSETS:
        graph = onnx.shape_inference.infer_shapes(onnx.load(exported["fp16", opset])).graph
        types = {each.name: each.type.tensor_type.elem_type for each in graph.value_info}
        types |= {each.name: each.data_type for each in graph.initializer}
        for node in graph.node:
            if node.op_type in ("LayerNormalization", "Softmax", "Sub"):  # Sub: the mean colour
                assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
            if node.op_type == "MatMul":
                assert types[node.input[0]] == TensorProto.FLOAT16
            if node.op_type == "Cast" and "images_of_whole_patches" in node.input[0]:
                pytest.fail("pixels are rounded before they are normalised")
        assert "Cast" not in {node.op_type for node in graph.node if IMAGES in node.input}


def test_a_difference_that_is_no_number_misses_every_bound() -> None:
    nan = float("nan")
    for bound in BOUNDS.values():
        assert missed({"a": Difference(0, 0, 1), "b": Difference(nan, nan, nan)}, bound) == "b"
        assert missed({"a": Difference(0, 0, 1)}, bound) is None


def test_images_of_the_comparison_are_like_photographs() -> None:
    images = likeness(2, 96, 144)
    assert torch.equal(images, likeness(2, 96, 144))
    assert 0 <= images.min() < 0.1 < 0.9 < images.max() <= 1
    neighbours = [images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]]
    assert all(each.abs().mean() < 0.1 * images.std() for each in neighbours)


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RecipeError, match=r"pip install 'featsharp-distill\[onnx\]'"):
        save_onnx(tmp_path / "s.onnx", file_of(build()))


def test_precision_and_opset_are_for_graphs_of_students(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, build())
    for options in (OnnxOptions("fp16", 20), OnnxOptions("fp32", 17)):
        with pytest.raises(RecipeError, match="--precision, --opset: are for --format onnx, not"):
            export(checkpoint, tmp_path / "s", onnx=options)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_weights_of_a_large_graph_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    path = _hand_made(tmp_path / "g.onnx")
    monkeypatch.setattr("distill.formats.onnx_precision._ONE_FILE", 1000)
    out = tmp_path / "sub" / "out.onnx"
    out.parent.mkdir()
    convert(path, out, precision)
    assert sorted(each.name for each in out.parent.iterdir()) == ["out.onnx", "out.onnx.data"]
    write_metadata(out, {"version": "1", "precision": precision})  # leaves them there
    assert out.stat().st_size < 10_000 < (tmp_path / "sub/out.onnx.data").stat().st_size
    assert session(out).get_modelmeta().custom_metadata_map["precision"] == precision
    assert _largest_difference(path, out) < 0.05
