"""What an ONNX file says of itself, so that a deployer needs nothing else.

The entries of `metadata_props`, which onnxruntime returns as `session.get_modelmeta()
.custom_metadata_map`. Those marked JSON hold JSON, the others plain text:

format       `featsharp-distill onnx 1`
version      of this package
torch        its version
opset        of ONNX's own operators
precision    fp32, fp16 or int8
integers     of int8: what multiplies integers
license      the hub's identifier, as in the model card
teachers     JSON, the licence of the weights of each
step         of its training, where it is known
input        JSON: name, dtype, axes, order of the colours, range of the values
patch_size   pixels; height and width are multiples of it
mean, std    JSON, by colour, for images in [0, 1]: the graph itself normalises with them
resolution   JSON, (height, width) in pixels that it was trained at, or that its table covers
outputs      JSON, for each: axes, channels, head (null: the backbone), pixels_per_cell (null: a
             summary) and space of its values
agreement    JSON, for each output: largest absolute difference from PyTorch in float32, relative
             difference (of norms), lowest mean cosine; with the sizes of the images in pixels
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import lfs_hint
from distill.formats.model_card import licence_of
from distill.formats.onnx_agreement import SIZES, Agreement
from distill.formats.onnx_graph import IMAGES, Output, require_onnx
from distill.formats.onnx_precision import LEVELS
from distill.formats.source import trained_sizes
from distill.runtime.config import parse_yaml
from distill.runtime.errors import RecipeError
from distill.runtime.run_folder import versions
from student.model import Student
from student.storage import StudentFile
from teachers.features import FeatureSpec
from teachers.messages import did_you_mean

FORMAT = "featsharp-distill onnx 1"


def describe(
    student: Student, file: StudentFile, outputs: Mapping[str, Output], agreement: Agreement
) -> dict[str, str]:
    """The entries of a student's graph, see the module."""
    patch, stored = student.spec.patch_size, file.metadata
    recipe = parse_yaml(stored["recipe"], "recipe") if "recipe" in stored else {}
    sizes = trained_sizes(stored, recipe)
    maps = "teacher" if stored.get("head_space") == "teacher" else "standardised"
    known, licences = versions(), json.loads(stored.get("licences", "{}"))
    axes = ["batch", "channels", "height", "width"]
    pixels = {"name": IMAGES, "dtype": "float32", "axes": axes, "colours": "RGB", "range": [0, 1]}
    rows = {name: each._asdict() | {"space": _space(each, maps)} for name, each in outputs.items()}
    compared = [[h * patch, w * patch] for h, w in SIZES]
    differences = {name: each._asdict() for name, each in agreement.outputs.items()}
    return {
        "format": FORMAT,
        "version": known["featsharp-distill"],
        "torch": known["torch"],
        "opset": str(agreement.opset),
        "precision": agreement.precision,
        **({"integers": LEVELS[agreement.level]} if agreement.precision == "int8" else {}),
        "license": licence_of(file),
        "teachers": json.dumps({name: licences.get(name) for name in file.targets}),
        **({"step": stored["step"]} if "step" in stored else {}),
        "input": json.dumps(pixels),
        "patch_size": str(patch),
        "mean": json.dumps(student.mean),
        "std": json.dumps(student.std),
        "resolution": json.dumps(sizes[-1] if sizes else student.spec.resolution),
        "outputs": json.dumps(rows),
        "agreement": json.dumps({"outputs": differences, "sizes": compared}),
    }


def _space(output: Output, maps: str) -> str:
    """Of the values of an output: the student's own, its teacher's, or standardised."""
    if output.head is None:
        return "own"
    return "teacher" if output.pixels_per_cell is None else maps


def write_metadata(graph: Path, entries: Mapping[str, str]) -> None:
    """Writes the entries into a graph's file; weights beside it stay as they are."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    onnx.helper.set_model_props(model, dict(entries))
    model.producer_name, model.producer_version = "featsharp-distill", entries["version"]
    onnx.save(model, graph)


def read_metadata(path: Path) -> dict[str, str]:
    """The entries of a file.

    Raises:
        RecipeError: there is no such file, or it was not written by `distill.export`.
    """
    require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*.onnx")])
        raise RecipeError(f"{path}: there is no such file{near}") from None
    except (DecodeError, IsADirectoryError) as error:
        raise RecipeError(f"{path}: not an ONNX file: {error}{lfs_hint(path)}") from None
    entries = {each.key: each.value for each in model.metadata_props}
    if entries.get("format") != FORMAT:
        raise RecipeError(
            f"{path}: its format is {entries.get('format')!r}, expected {FORMAT!r}; only graphs of "
            "`distill.export --format onnx` say what they take and return"
        )
    return entries


def spec_of(
    entries: Mapping[str, str],
    head: str | None,
    where: Path,
    resolution: tuple[int, int] | None = None,
) -> FeatureSpec:
    """What the backbone or a head of a graph returns and accepts.

    Args:
        entries: of the graph.
        head: the teacher whose head it is; None for the backbone.
        where: the file, for messages.
        resolution: (height, width) in pixels in the place of the one that the file has.

    Raises:
        RecipeError: the graph has no such head, or its cells have no whole number of pixels.
    """
    outputs: dict[str, dict[str, Any]] = json.loads(entries["outputs"])
    known = list(dict.fromkeys(each["head"] for each in outputs.values() if each["head"]))
    if head is not None and head not in known:
        have = f"there are {', '.join(known)}" if known else "it has none"
        raise RecipeError(f"{where}: no head {head!r}{did_you_mean(head, known)}; {have}")
    prefix = "" if head is None else f"{head}_"
    spatial, summary = outputs[f"{prefix}spatial"], outputs.get(f"{prefix}summary")
    cell = spatial["pixels_per_cell"]
    if cell != int(cell):
        raise RecipeError(
            f"{where}: the cells of {prefix}spatial have {cell} px; a cell must be a whole number "
            "of pixels"
        )
    height, width = resolution or json.loads(entries["resolution"])
    return FeatureSpec(
        summary_dim=None if summary is None else int(summary["channels"]),
        spatial_dim=int(spatial["channels"]),
        patch_size=int(cell),
        resolution=(height, width),
        any_resolution=True,
        spatial_from=f"graph, {prefix}spatial",
        summary_from=f"graph, {prefix}summary",
    )
