"""Writes a student as an ONNX graph for any batch, height and width.

The input `images` is float32 (B, 3, H, W) in [0, 1]. H and W must be multiples of the patch size,
which a graph cannot check. The outputs are `summary` and `spatial` of the backbone, and
`NAME_summary` and `NAME_spatial` of each head; a teacher without a summary has no `NAME_summary`.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.runtime.errors import RecipeError
from student.model import Student

TOLERANCE = 1e-4  # absolute and relative


class _Outputs(nn.Module):
    """Returns the outputs of a student as one flat mapping, as ONNX graphs do."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        backbone, heads = self.student(images)
        named = {"": backbone, **{f"{name}_": features for name, features in heads.items()}}
        return {
            f"{prefix}{kind}": value
            for prefix, features in named.items()
            for kind, value in features._asdict().items()
            if value is not None
        }


@torch.no_grad()
def save_onnx(path: Path, student: Student) -> float:
    """Writes a student, after comparing the graph with PyTorch at two sizes, one not square.

    Args:
        path: the file to write; weights of more than 1.5 GiB go to `*.data` beside it.
        student: in float32.

    Returns:
        The largest absolute difference of an output from PyTorch.

    Raises:
        RecipeError: the extra `onnx` is not installed.
        RuntimeError: the graph and the student differ by more than `TOLERANCE`.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise RecipeError(
            f"--format onnx: {error.name} is missing; pip install 'featsharp-distill[onnx]'"
        ) from None
    model = _Outputs(student).eval()
    p = student.spec.patch_size
    example = torch.rand(2, 3, 3 * p, 4 * p)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about internals of torch
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=list(model(example)),
            dynamic_shapes={"images": {0: batch, 2: p * height, 3: p * width}},
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # it has paths of this machine
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        program.save(written)
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        difference = max(_compare(model, session, (h * p, w * p)) for h, w in ((6, 6), (4, 9)))
        large_weights(path).unlink(missing_ok=True)  # of a larger graph that is replaced
        for each in sorted(Path(folder).iterdir(), reverse=True):  # the graph after its weights
            each.replace(path.parent / each.name)
    return difference


def large_weights(path: Path) -> Path:
    """The file for the weights of a graph that is too large for one file."""
    return path.with_name(f"{path.name}.data")


def _compare(model: nn.Module, session: Any, size: tuple[int, int]) -> float:
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    returned = map(torch.from_numpy, session.run(list(expected), {"images": images.numpy()}))
    largest = 0.0
    for (name, value), other in zip(expected.items(), returned, strict=True):
        if not torch.allclose(other, value, rtol=TOLERANCE, atol=TOLERANCE):
            off = float((other - value).abs().max())
            raise RuntimeError(f"--format onnx: {name} of the graph is {off:.1e} off at {size} px")
        largest = max(largest, float((other - value).abs().max()))
    return largest
