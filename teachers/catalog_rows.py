"""The known encoders, read from `catalog.tsv`: the data of `teachers.catalog`.

A test checks every fact against the libraries. `Row.entry` is what recipes write; no teacher is
built from here.
"""

import csv
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Json

from teachers.config import StrictConfig
from teachers.features import FeatureSpec, Padding
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

PIXELS = {
    "OpenAI": (OPENAI_MEAN, OPENAI_STD),
    "ImageNet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "satellite": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),  # SAT-493M, as in timm
}


class Row(StrictConfig):
    """One encoder: a line of the table, where empty cells stand for the defaults.

    Attributes:
        name: its usual name.
        kind: of the recipe's entry.
        model: of the recipe's entry.
        weights: of the recipe's entry; None where the entry needs none, or a local file.
        options: the other keys of the entry, as JSON in the table.
        width: channels of the map.
        summary: channels of the summary; None where there is none.
        patch: pixels of a cell.
        side: pixels of the native, square image.
        sizes: `any` multiple of the patch (with `padding` any size); `asked`, if `resolution` is
            set; `one`, only that size.
        pixels: the normalisation, a key of `PIXELS`.
        place: where the map is taken, as in the spec of the built teacher.
        millions: of parameters of the built teacher.
        licence: of the weights, a key of `LICENCES`.
        padding: of a CNN that takes any size, see `FeatureSpec`.
    """

    name: str
    kind: str
    model: str
    weights: str | None = None
    options: Json[dict[str, Any]] = {}
    width: int
    summary: int | None = None
    patch: int
    side: int
    sizes: Literal["one", "asked", "any"]
    pixels: str
    place: str
    millions: float
    licence: str
    padding: Padding | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What a recipe writes."""
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"kind": self.kind, "model": self.model, **weights, **self.options}

    @property
    def spec(self) -> FeatureSpec:
        """The spec of the teacher without an upsampler."""
        cells = -(-self.side // self.patch)
        return FeatureSpec(
            summary_dim=self.summary,
            spatial_dim=self.width,
            patch_size=self.patch,
            resolution=(self.side, self.side),
            any_resolution=self.sizes == "any",
            native_grid=None if self.padding is None else (cells, cells),
            padding=self.padding,
        )


def _read_rows() -> tuple[Row, ...]:
    with Path(__file__).with_name("catalog.tsv").open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        cells = [{key: value for key, value in line.items() if value} for line in lines]
    return tuple(map(Row.model_validate, cells))


ROWS = _read_rows()


class OpenKind(NamedTuple):
    """A kind that takes any model of a library, which describes itself.

    Attributes:
        name: what it takes.
        kind: of the recipe's entry.
        model: what its entry names as model.
        keys: other keys that its entry needs.
        library: the package that must be installed.
    """

    name: str
    kind: str
    model: str
    keys: str
    library: str


OPEN_KINDS = (
    OpenKind("any timm feature map", "timm", "one of timm.list_models(), or a folder", "", "timm"),
    OpenKind(
        "any open_clip tower",
        "open_clip",
        "one of open_clip.list_models(), or a folder",
        "weights: TAG",
        "open_clip",
    ),
    OpenKind(
        "any transformers vision model",
        "hf",
        "one that AutoModel knows, or a folder",
        "",
        "transformers",
    ),
    OpenKind(
        "any RADIO-format checkpoint", "radio", "", "weights: FILE, resolution: [H, W]", "timm"
    ),
    OpenKind("a student of ours", "student", "", "path: RUN, CHECKPOINT or FILE", "timm"),
    OpenKind("a class of your own", "package.module:Class", "", "those of its Config", "torch"),
)
