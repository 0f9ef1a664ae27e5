"""Teachers of the RADIO family: RADIOv2.5 and C-RADIO, from a local file in the public format.

The network is timm's NaFlexVit, which has RADIO's position embedding as an option: the table
resized bilinearly to a square of the grid's longer side, without antialiasing and with half-pixel
centres, and cropped top left (../shared/reference/radio-training.md 1.2). timm notes that the
hub's own code for C-RADIOv3-B and -H aligns corners instead; the public loader, which is followed
here, does so for none (radio-format.md).

Features are the published ones of the backbone: what the last block returns, after the final norm
only where the checkpoint has one. Heads into other teachers' spaces are ignored: who wants these
spaces takes those teachers.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import timm
import torch
from pydantic import Field, PositiveInt
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean
from teachers.normalization import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD
from teachers.radio_format import RadioArchitecture, RadioCheckpoint, read_radio
from teachers.teacher import Teacher, TeacherConfig
from teachers.timm_teacher import layer_maps
from teachers.weights import fetch, load_strictly, on_meta, seeded, shorten

# Width, depth, heads and MLP ratio (radio-training.md 1.1) behind names that timm does not have.
_SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 4304 / 1152),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1536, 40, 24, 4.0),
    "bigG": (1664, 48, 16, 8192 / 1664),
}
# What a checkpoint's `model_kwargs` may say: shapes, and what its tensors say anyhow.
_SHAPES = {"embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"}
_OVERRIDDEN = {
    *("img_size", "patch_size", "init_values", "class_token", "reg_tokens", "no_embed_class"),
    *("dynamic_img_size", "num_classes", "drop_rate", "drop_path_rate"),
}
_SIZED_NAME = re.compile(rf"vit_({'|'.join(_SIZES)})_patch(14|16)(_v2)?_224")


def _published(
    model: str, teachers: tuple[str, ...], registers: int, **changes: Any
) -> RadioArchitecture:
    """One of the family: SAM, the last of the teachers, has a class token but no summary."""
    values: dict[str, Any] = {
        "model": model,
        "model_kwargs": {},
        "patch_size": 16,
        "table_side": 128,
        "class_tokens": teachers,
        "summary": teachers[:-1],
        "registers": registers,
        "final_norm": False,
        "layer_scale": False,
        "patch_bias": False,
        "mean": OPENAI_MEAN,
        "std": OPENAI_STD,
    }
    return RadioArchitecture(**values | changes)


_V2_5 = ("clip", "siglip", "dino_v2", "sam")
_V3 = ("clip", "siglip2-g", "dino_v2", "sam")
_V4 = ("siglip2-g", "dino_v3", "sam3")
_DINO = {
    "patch_size": 14,
    "layer_scale": True,
    "patch_bias": True,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
# Each with the side in pixels that it is meant for (radio-training.md 1.5). v3 and v4 as in timm;
# the registers of v2.5, and that its B and L have no LayerScale, are not in our references. Only
# random weights and the meta device depend on it: a file says what it holds.
PUBLISHED: dict[str, tuple[RadioArchitecture, int]] = {
    "radio_v2.5-b": (_published("vit_base_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-l": (_published("vit_large_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-h": (_published("vit_huge_patch16_224", _V2_5, 4), 768),
    "radio_v2.5-g": (_published("vit_giant_patch14_reg4_dinov2", _V2_5, 4, **_DINO), 896),
    "c-radio_v3-b": (_published("vit_base_patch16_v2_224", _V3, 4, layer_scale=True), 512),
    "c-radio_v3-l": (_published("vit_large_patch16_v2_224", _V3, 4, layer_scale=True), 512),
    "c-radio_v3-h": (_published("vit_huge_patch16_224", _V3, 4), 512),
    "c-radio_v3-g": (_published("vit_giant_patch16_224", _V3, 4), 512),
    "c-radio_v4-so400m": (_published("vit_so400m_patch16_224", _V4, 7), 512),
    "c-radio_v4-h": (_published("vit_huge_patch16_224", _V4, 7), 512),
}


class RadioConfig(TeacherConfig):
    """A model of the RADIO family.

    Attributes:
        model: a published name, `radio_v2.5-l`. None for any checkpoint in the public format,
            then `weights` and `resolution` are needed.
        weights: a local file in the public format; a `.safetensors` file of the hub with its
            `config.json` beside it, or their folder; or `none` for random weights.
        summary: the teachers whose class tokens are the summary, one after the other; None for
            the published ones.
        resolution: (height, width) in pixels to run at, a multiple of the patch size; None for
            the one that the published model is meant for.
    """

    kind: str = "radio"
    model: str | None = None
    weights: str | None = None
    summary: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    resolution: tuple[PositiveInt, PositiveInt] | None = None


class RadioTeacher(Teacher):
    """A RADIO backbone; accepts every multiple of its patch size.

    Args:
        config: model, weights and what to read from it.

    Raises:
        TeacherError: no such model, a file that is no RADIO checkpoint, or does not fit.
    """

    Config: ClassVar[type[TeacherConfig]] = RadioConfig

    def __init__(self, config: RadioConfig) -> None:
        published = _find(config)
        checkpoint = _read(config, known=published is not None)
        architecture = checkpoint.architecture if checkpoint else PUBLISHED[str(config.model)][0]
        # A file's weights go into fresh storage: a random ViT-H alone takes many seconds.
        with torch.device("meta") if checkpoint else nullcontext():
            network = build_trunk(architecture)
        spec = _spec(config, architecture, network)
        super().__init__(
            spec, mean=architecture.mean, std=architecture.std, chunk_size=config.chunk_size
        )
        if checkpoint and published:
            with torch.device("meta"):
                due = _spec(config, published, build_trunk(published))
            if spec != due:
                raise TeacherError(
                    f"weights: {config.weights} holds a model of {spec}, and {config.model!r} is "
                    f"one of {due}"
                )
        if checkpoint and not on_meta():
            load_strictly(network.to_empty(device="cpu"), checkpoint.tensors, str(config.weights))
        self.network: Any = network
        self.num_layers = len(self.network.blocks)
        self.slots = _slots(config, architecture)

    def extract(self, images: Tensor) -> Features:
        """Runs the backbone; see `Teacher.extract`."""
        tokens = self.network.forward_features(images)
        patches = tokens[:, self.network.num_prefix_tokens :]
        grid = self.spec.grid(*images.shape[-2:])
        return Features(
            tokens[:, list(self.slots)].flatten(1), patches.transpose(1, 2).unflatten(2, grid)
        )

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The patch tokens of some blocks, after the final norm only where there is one."""
        return layer_maps(self.network, images, indices)


def build_trunk(architecture: RadioArchitecture) -> NaFlexVit:
    """The network with random weights, always the same ones.

    Raises:
        TeacherError: its model is neither timm's nor one of the family's, or no plain ViT.
    """
    name, kwargs = _timm_model(architecture)
    side = architecture.table_side
    options = {
        "use_naflex": True,
        "num_classes": 0,
        "global_pool": "token",
        "fc_norm": False,
        "final_norm": architecture.final_norm,
        "init_values": 1e-5 if architecture.layer_scale else None,
        "patch_size": architecture.patch_size,
        "patchify_channels_last": False,
        "class_token": True,
        "reg_tokens": len(architecture.class_tokens) + architecture.registers - 1,
        "pos_embed_grid_size": (side, side),
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,
        "pos_embed_antialias": False,
    }
    try:
        with seeded():
            network = timm.create_model(name, **kwargs | options)
    except (TypeError, AssertionError) as error:
        raise TeacherError(f"model: timm's {name!r} is no ViT: {shorten(str(error))}") from None
    if not isinstance(network, NaFlexVit) or network.rope is not None:
        raise TeacherError(f"model: timm's {name!r} is no ViT with a position table")
    if not architecture.patch_bias:
        network.embeds.proj.register_parameter("bias", None)
    return network


def _timm_model(architecture: RadioArchitecture) -> tuple[str, dict[str, Any]]:
    """timm's name for the blocks, and what it does not say."""
    model, given = architecture.model, architecture.model_kwargs
    unknown = sorted(set(given) - _SHAPES - _OVERRIDDEN)
    if unknown:
        raise TeacherError(
            f"model_kwargs: {', '.join(unknown)} of {model!r} is not read here; known are "
            f"{', '.join(sorted(_SHAPES | _OVERRIDDEN))}"
        )
    chosen = {key: value for key, value in given.items() if key in _SHAPES}
    if timm.is_model(model) and ":" not in model:
        return model, chosen
    sized = _SIZED_NAME.fullmatch(model)
    if sized is None:
        raise TeacherError(
            f"model: {model!r} of the checkpoint is no timm model"
            f"{did_you_mean(model, timm.list_models('vit_*'))} and none of the family's "
            f"vit_SIZE_patchP_224 or vit_SIZE_patchP_v2_224, SIZE one of {', '.join(_SIZES)}"
        )
    width, depth, heads, ratio = _SIZES[sized[1]]
    named = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}
    return "vit_base_patch16_224", named | chosen


def _find(config: RadioConfig) -> RadioArchitecture | None:
    if config.model is None:
        return None
    if config.model not in PUBLISHED:
        raise TeacherError(
            f"model: {config.model!r} is none of the family{did_you_mean(config.model, PUBLISHED)}"
            f"; choose one of {list(PUBLISHED)}, or leave it out and give weights"
        )
    return PUBLISHED[config.model][0]


def _read(config: RadioConfig, *, known: bool) -> RadioCheckpoint | None:
    """The file, where there is one; on the meta device only to learn an unknown architecture."""
    if config.weights in (None, "none"):
        if not known:
            raise TeacherError("model: missing, and so is a file of weights; give one or both")
        if config.weights is None and not on_meta():
            raise TeacherError(
                f"weights: {config.model!r} is not downloaded by itself. "
                f"{fetch(_repository(str(config.model)), 'weights')}; or none for random weights"
            )
        return None
    return None if known and on_meta() else read_radio(Path(str(config.weights)))


def _repository(model: str) -> str:
    """Where a published model lies on the hub: C-RADIOv3-L, and RADIO-L for radio_v2.5-l."""
    family, _, version = model.partition("_v")
    number, _, size = version.partition("-")
    size = size if size == "g" else size.upper()
    return f"nvidia/{family.upper()}{'' if family == 'radio' else f'v{number}'}-{size}"


def _slots(config: RadioConfig, architecture: RadioArchitecture) -> tuple[int, ...]:
    """Positions of the summary's class tokens."""
    names = config.summary or architecture.summary
    for name in names:
        if name not in architecture.class_tokens:
            raise TeacherError(
                f"summary: no class token of {name!r}"
                f"{did_you_mean(name, architecture.class_tokens)}; the model has those of "
                f"{list(architecture.class_tokens)}"
            )
    return tuple(architecture.class_tokens.index(name) for name in names)


def _spec(config: RadioConfig, architecture: RadioArchitecture, network: NaFlexVit) -> FeatureSpec:
    patch = architecture.patch_size
    resolution = config.resolution
    if resolution is None and config.model is None:
        raise TeacherError(
            "resolution: missing; a checkpoint does not say which size it is meant for, so give "
            f"(height, width) in multiples of {patch} px, or a published model"
        )
    side = PUBLISHED[config.model][1] if config.model else 0
    spec = FeatureSpec(
        summary_dim=network.embed_dim * len(_slots(config, architecture)),
        spatial_dim=network.embed_dim,
        patch_size=patch,
        resolution=resolution or (side, side),
        any_resolution=True,
        spatial_from=f"last block, {'after the' if architecture.final_norm else 'without a'} final "
        "norm",
        summary_from=f"class tokens of {', '.join(config.summary or architecture.summary)}",
    )
    if any(length % patch for length in spec.resolution):
        raise TeacherError(f"resolution: {resolution} is no multiple of patches of {patch} px")
    return spec
