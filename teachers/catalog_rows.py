"""The encoders that we know by name, and what is true of each: the data of `teachers.catalog`.

Every fact is checked against the libraries by a test for each row. What recipes write is `entry`;
nothing is built from here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from teachers.features import FeatureSpec
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

HALF = (0.5, 0.5, 0.5)
_NORMED = "last block, after the final norm"
_CLIP_PLACE = f"{_NORMED}, before the projection"
PIXELS = {
    "OpenAI": (OPENAI_MEAN, OPENAI_STD),
    "ImageNet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": (HALF, HALF),
    "satellite": ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143)),  # SAT-493M, as in timm
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One encoder.

    Attributes:
        name: what people call it.
        kind: of the recipe's entry.
        model: of the recipe's entry.
        weights: of the recipe's entry; None where the entry needs none, or a file of your own.
        options: what else the entry says.
        width: channels of the map.
        summary: channels of the summary; None where there is none.
        patch: pixels of a cell.
        side: pixels of the native, square image.
        sizes: `any`, any multiple of the patch; `asked`, the same once the recipe sets
            `resolution`; `one`, the one that the recipe sets as `resolution`.
        pixels: the normalisation, a key of `PIXELS`.
        place: where the map is taken, as the spec of the built teacher says.
        millions: of parameters in what is built.
        licence: of the weights, a key of `LICENCES`.
    """

    name: str
    kind: str = "timm"
    model: str
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    width: int
    summary: int | None
    patch: int
    side: int
    sizes: Literal["one", "asked", "any"]
    pixels: str
    place: str = _NORMED
    millions: float
    licence: str = "apache-2.0"

    @property
    def entry(self) -> dict[str, Any]:
        """What a recipe writes."""
        weights = {} if self.weights is None else {"weights": self.weights}
        return {"kind": self.kind, "model": self.model, **weights, **self.options}

    @property
    def spec(self) -> FeatureSpec:
        """What the encoder promises by itself."""
        return FeatureSpec(
            summary_dim=self.summary,
            spatial_dim=self.width,
            patch_size=self.patch,
            resolution=(self.side, self.side),
            any_resolution=self.sizes == "any",
        )


_Clip = tuple[str, str, int, int, int, int, float]


def _clips(family: str, weights: str, licence: str, *models: _Clip) -> Iterator[Row]:
    for size, model, width, summary, patch, side, millions in models:
        yield Row(
            name=f"{family} {size}", kind="dfn_clip", model=model, weights=weights,
            width=width, summary=summary, patch=patch, side=side, sizes="one", pixels="OpenAI",
            place=_CLIP_PLACE, millions=millions, licence=licence,
        )  # fmt: skip


def _siglip(name: str, model: str, width: int, patch: int, side: int, millions: float) -> Row:
    return Row(
        name=name, kind="siglip", model=model, weights="webli",
        width=width, summary=width, patch=patch, side=side, sizes="one", pixels="half",
        millions=millions,
    )  # fmt: skip


def _naflex(name: str, size: str, width: int, millions: float) -> Row:
    return Row(
        name=f"SigLIP2 {name}/16 NaFlex", model=f"naflexvit_{size}_patch16_siglip.v2_webli",
        width=width, summary=width, patch=16, side=384, sizes="any", pixels="half",
        millions=millions,
    )  # fmt: skip


def _supervised(name: str, model: str, width: int, millions: float) -> Row:
    return Row(
        name=f"supervised ViT {name}/16-224", model=model,
        width=width, summary=width, patch=16, side=224, sizes="asked", pixels="half",
        millions=millions,
    )  # fmt: skip


def _dinov2(size: str, width: int, millions: float) -> Iterator[Row]:
    for registers, words in (("", ""), ("reg4_", ", 4 registers")):
        yield Row(
            name=f"DINOv2 {size[0].upper()}/14{words}",
            model=f"vit_{size}_patch14_{registers}dinov2.lvd142m",
            width=width, summary=width, patch=14, side=518, sizes="asked", pixels="ImageNet",
            millions=millions,
        )  # fmt: skip


def _dinov3(name: str, model: str, width: int, millions: float, pixels: str = "ImageNet") -> Row:
    return Row(
        name=f"DINOv3 {name}", model=model,
        width=width, summary=width, patch=16, side=256, sizes="any", pixels=pixels,
        millions=millions, licence="dinov3-license",
    )  # fmt: skip


def _sam(size: str, width: int, millions: float) -> Row:
    return Row(
        name=f"SAM {size[0].upper()}/16", model=f"samvit_{size}_patch16.sa1b",
        options={"features": -1, "summary": "none"},
        width=width, summary=None, patch=16, side=1024, sizes="asked", pixels="ImageNet",
        place="last block, before the neck", millions=millions,
    )  # fmt: skip


def _paligemma(generation: str, side: int, tag: str, millions: float) -> Row:
    return Row(
        name=f"{generation} tower SO400M/14-{side}",
        model=f"vit_so400m_patch14_siglip_gap_{side}.{tag}", options={"summary": "none"},
        width=1152, summary=None, patch=14, side=side, sizes="asked", pixels="half",
        millions=millions, licence="gemma",
    )  # fmt: skip


def _florence(name: str, size: str, width: int, millions: float) -> Row:
    return Row(
        name=f"Florence-2 {name}, DaViT", model=f"davit_{size}_fl.msft_florence2",
        width=width, summary=width, patch=32, side=768, sizes="any", pixels="ImageNet",
        place="last block, without a final norm", millions=millions, licence="mit",
    )  # fmt: skip


def _radio(
    model: str, width: int, tokens: int, millions: float, patch: int = 16, side: int = 512,
    pixels: str = "OpenAI", licence: str = "nvidia-open-model-license",
) -> Row:  # fmt: skip
    family, _, version = model.partition("_")
    return Row(
        name=f"{family.upper()}{version[0]}{version[1:].upper()}", kind="radio", model=model,
        width=width, summary=tokens * width, patch=patch, side=side, sizes="any", pixels=pixels,
        place="last block, without a final norm", millions=millions, licence=licence,
    )  # fmt: skip


def _small(kind: str, model: str, pixels: str, millions: float, place: str) -> Row:
    return Row(
        name=f"small {kind}, shipped here", kind=kind, model=model,
        width=192, summary=192, patch=16, side=128, sizes="one", pixels=pixels,
        place=place, millions=millions,
    )  # fmt: skip


ROWS: tuple[Row, ...] = (
    *_clips(
        "DFN CLIP", "dfn5b", "apple-amlr",
        ("H/14-378", "ViT-H-14-378-quickgelu", 1280, 1024, 14, 378, 632.7),
        ("H/14-224", "ViT-H-14-quickgelu", 1280, 1024, 14, 224, 632.1),
    ),
    *_clips(
        "DFN CLIP", "dfn2b", "apple-amlr",
        ("L/14-224", "ViT-L-14-quickgelu", 1024, 768, 14, 224, 304.0),
    ),
    *_clips(
        "OpenAI CLIP", "openai", "mit",
        ("B/32-224", "ViT-B-32-quickgelu", 768, 512, 32, 224, 87.8),
        ("B/16-224", "ViT-B-16-quickgelu", 768, 512, 16, 224, 86.2),
        ("L/14-224", "ViT-L-14-quickgelu", 1024, 768, 14, 224, 304.0),
        ("L/14-336", "ViT-L-14-336-quickgelu", 1024, 768, 14, 336, 304.3),
    ),
    *_clips(
        "MetaCLIP", "metaclip_fullcc", "cc-by-nc-4.0",
        ("B/16-224", "ViT-B-16-quickgelu", 768, 512, 16, 224, 86.2),
        ("L/14-224", "ViT-L-14-quickgelu", 1024, 768, 14, 224, 304.0),
        ("H/14-224", "ViT-H-14-quickgelu", 1280, 1024, 14, 224, 632.1),
        ("bigG/14-224", "ViT-bigG-14-quickgelu", 1664, 1280, 14, 224, 1844.9),
    ),
    _siglip("SigLIP B/16-224", "ViT-B-16-SigLIP", 768, 16, 224, 92.9),
    _siglip("SigLIP SO400M/14-224", "ViT-SO400M-14-SigLIP", 1152, 14, 224, 427.7),
    _siglip("SigLIP SO400M/14-384", "ViT-SO400M-14-SigLIP-384", 1152, 14, 384, 428.2),
    _siglip("SigLIP2 B/16-256", "ViT-B-16-SigLIP2-256", 768, 16, 256, 92.9),
    _siglip("SigLIP2 SO400M/16-256", "ViT-SO400M-16-SigLIP2-256", 1152, 16, 256, 427.9),
    _siglip("SigLIP2 SO400M/14-378", "ViT-SO400M-14-SigLIP2-378", 1152, 14, 378, 428.2),
    _siglip("SigLIP2 SO400M/16-384", "ViT-SO400M-16-SigLIP2-384", 1152, 16, 384, 428.3),
    _siglip("SigLIP2 SO400M/16-512", "ViT-SO400M-16-SigLIP2-512", 1152, 16, 512, 428.8),
    _siglip("SigLIP2 g-opt/16-256", "ViT-gopt-16-SigLIP2-256", 1536, 16, 256, 1163.2),
    _siglip("SigLIP2 g-opt/16-384", "ViT-gopt-16-SigLIP2-384", 1536, 16, 384, 1163.7),
    _naflex("B", "base", 768, 92.9),
    _naflex("SO400M", "so400m", 1152, 427.9),
    *_dinov2("small", 384, 22.1),
    *_dinov2("base", 768, 86.6),
    *_dinov2("large", 1024, 304.4),
    *_dinov2("giant", 1536, 1136.5),
    _dinov3("S/16", "vit_small_patch16_dinov3.lvd1689m", 384, 21.6),
    _dinov3("S+/16", "vit_small_plus_patch16_dinov3.lvd1689m", 384, 28.7),
    _dinov3("B/16", "vit_base_patch16_dinov3.lvd1689m", 768, 85.6),
    _dinov3("L/16", "vit_large_patch16_dinov3.lvd1689m", 1024, 303.1),
    _dinov3("L/16, satellite", "vit_large_patch16_dinov3.sat493m", 1024, 303.1, "satellite"),
    _dinov3("H+/16", "vit_huge_plus_patch16_dinov3.lvd1689m", 1280, 840.5),
    _dinov3("7B/16", "vit_7b_patch16_dinov3.lvd1689m", 4096, 6716.0),
    _sam("base", 768, 89.7),
    _sam("large", 1024, 308.3),
    _sam("huge", 1280, 637.0),
    _supervised("S", "vit_small_patch16_224.augreg_in21k_ft_in1k", 384, 21.7),
    _supervised("B", "vit_base_patch16_224.augreg_in21k", 768, 85.8),
    _paligemma("PaliGemma", 224, "pali_pt", 412.4),
    _paligemma("PaliGemma", 448, "pali_pt", 413.3),
    _paligemma("PaliGemma", 896, "pali_pt", 416.9),
    _paligemma("PaliGemma 2", 448, "pali2_3b_pt", 413.3),
    _radio("radio_v2.5-b", 768, 3, 98.2, side=768, licence="nsclv1"),
    _radio("radio_v2.5-l", 1024, 3, 319.9, side=768, licence="nsclv1"),
    _radio("radio_v2.5-h", 1280, 3, 651.6, side=768, licence="nsclv1"),
    _radio("radio_v2.5-g", 1536, 3, 1159.5, 14, 896, pixels="ImageNet", licence="nsclv1"),
    _radio("c-radio_v3-b", 768, 3, 98.3),
    _radio("c-radio_v3-l", 1024, 3, 319.9),
    _radio("c-radio_v3-h", 1280, 3, 651.6),
    _radio("c-radio_v3-g", 1536, 3, 1159.6),
    _radio("c-radio_v4-so400m", 1152, 2, 431.2),
    _radio("c-radio_v4-h", 1280, 2, 651.6),
    _florence("base", "base", 1024, 90.4),
    _florence("large", "huge", 2048, 360.6),
    _small("dfn_clip", "clip_ti16_128", "OpenAI", 3.8, _CLIP_PLACE),
    _small("siglip", "siglip_ti16_128", "half", 3.7, _NORMED),
)  # fmt: skip


class OpenKind(NamedTuple):
    """A kind that takes any model of a library: its facts are read from there.

    Attributes:
        name: what it takes.
        kind: of the recipe's entry.
        model: what its entry names as model.
        keys: what its entry needs besides.
        library: that must be importable.
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
