"""Teachers from open_clip: the vision tower of any of its models.

Only the vision tower is built and read; of a published checkpoint, only its `visual.*` tensors.
The small teachers that this package ships (`teachers/small/`) load through the same classes.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.model import _build_vision_tower  # the only way to build no text tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from pydantic import PositiveInt, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.files import OPEN_CLIP_SETS
from teachers.messages import say_once
from teachers.open_clip_source import OpenClipSource, find_source, locate_weights
from teachers.pixels import NormalisedConfig, Pixels, choose_pixels
from teachers.teacher import Teacher, TeacherConfig
from teachers.weights import load_strictly, read_tensors, seeded, shorten, without_storage


class OpenClipConfig(NormalisedConfig):
    """The vision tower of any open_clip model.

    Attributes:
        model: an open_clip model name, a small teacher that this package ships, a local directory
            in hub layout (`open_clip_config.json` beside the weights), or `hf-hub:ORG/NAME`.
        weights: a pretrained tag of open_clip, a local file or directory, or `none` for random
            weights. May be left out where `model` is a directory or repository: its own weights.
            An `open_clip_config.json` beside a file states its normalisation.
        resolution: (height, width) in pixels to interpolate positions to; None for the trained one.
        summary: `embedding`, the image embedding that the text tower is compared with; `cls`, a
            CLIP ViT's class token before the projection to it; or `pool`, what a SigLIP's
            attention pool returns, which is its embedding.
    """

    kind: str = "open_clip"
    model: str
    weights: str | None = None
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    summary: Literal["embedding", "cls", "pool"] = "embedding"

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves a default summary out, as before the key existed: entries identify caches."""
        entry: dict[str, Any] = super()._serialize(handler)
        if self.kind != "dfn_clip" and self.summary == type(self).model_fields["summary"].default:
            entry.pop("summary", None)
        return entry


class DFNCLIPConfig(OpenClipConfig):
    """A CLIP ViT; `summary` is `embedding` or `cls`."""

    kind: str = "dfn_clip"
    summary: Literal["embedding", "cls"] = "embedding"


class SigLIPConfig(OpenClipConfig):
    """A SigLIP; its summary is the output of the attention pool."""

    kind: str = "siglip"
    summary: Literal["pool"] = "pool"


class OpenClipTeacher(Teacher):
    """Any tower of open_clip: ViTs, EVA, ConvNeXt, CLIPA, CoCa, MobileCLIP, the ResNets of CLIP.

    Spatial: the map of the last block or stage, after the final norm where that norm applies to
    tokens; a norm after the pooling does not. In a CLIP ViT this is before the projection: what
    open_clip itself returns as tokens, and the space that the class token is pooled from. In a
    SigLIP these tokens enter the attention pool.

    Args:
        config: model, weights and summary.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, a tower without a map, or
            without that summary.
    """

    Config: ClassVar[type[TeacherConfig]] = OpenClipConfig
    fingerprinted_as: ClassVar[str] = "teachers.open_clip_tower.OpenClipTower"
    token_list: ClassVar[bool] = False  # whether every tower of this kind returns normed tokens

    def __init__(self, config: OpenClipConfig) -> None:
        source = find_source(config.model, config.weights)
        visual = _build_tower(source)
        self._check_tower(visual, config)
        path = locate_weights(source)
        if path is not None:
            tensors = read_tensors(path, prefix="visual.", order=OPEN_CLIP_SETS)
            load_strictly(visual, tensors, str(path))
        if config.resolution is not None:
            _resize(visual, config.resolution)
        if config.summary == "cls":
            visual.proj = None
        mean, std = _pixels(source, config)
        super().__init__(
            _spec(visual, config.summary), mean=mean, std=std, chunk_size=config.chunk_size
        )
        self.visual = visual
        self.weights_file = path  # no part of the fingerprint: where weights lie changes nothing
        self.num_layers = _num_layers(visual)
        if not self.token_list:
            self.normed = _norms_tokens(visual)

    def extract(self, images: Tensor) -> Features:
        """Runs the tower; see `Teacher.extract`."""
        found = self._run(
            images, [self.num_layers - 1], output_fmt="NLC" if self.token_list else "NCHW"
        )
        spatial = found["image_intermediates"][0]
        if self.token_list:  # a view: the map stays channels-last in memory
            h, w = self.spec.grid(*images.shape[-2:])
            spatial = rearrange(spatial, "b (h w) d -> b d h w", h=h, w=w)
        return Features(found["image_features"], spatial)

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some blocks or stages, normed as that of the last one."""
        maps: list[Tensor] = self._run(images, indices, intermediates_only=True)[
            "image_intermediates"
        ]
        return maps

    def _run(self, images: Tensor, indices: Sequence[int], **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.visual.forward_intermediates(
            images,
            indices=list(indices),
            normalize_intermediates=self.token_list or self.normed,
            **options,
        )
        return found

    @staticmethod
    def _check_tower(visual: Any, config: OpenClipConfig) -> None:
        """Raises TeacherError where the tower lacks the map or the summary."""
        if config.summary == "cls":
            _require_class_token(visual, config)
        elif config.summary == "pool":
            _require_attention_pool(visual, config)
        elif not hasattr(getattr(visual, "trunk", visual), "forward_intermediates"):
            raise TeacherError(f"model: open_clip returns no feature maps of {config.model!r}")


class DFNCLIP(OpenClipTeacher):
    """Kind `dfn_clip`: a plain CLIP ViT, such as those of DFN CLIP, OpenAI CLIP and MetaCLIP."""

    Config: ClassVar[type[TeacherConfig]] = DFNCLIPConfig
    token_list = True

    def __init__(self, config: DFNCLIPConfig) -> None:
        super().__init__(config)
        self.visual.output_tokens = True  # unused here, but part of the fingerprint

    @staticmethod
    def _check_tower(visual: Any, config: OpenClipConfig) -> None:
        _require_class_token(visual, config)


class SigLIP(OpenClipTeacher):
    """Kind `siglip`: a SigLIP or SigLIP 2 ViT, such as `ViT-SO400M-14-SigLIP-384` with `webli`.

    With 14 px patches and 384 px, 6 px at the right and bottom fill no patch;
    `resolution: [378, 378]` leaves none over and keeps the grid and the weights as they are.
    """

    Config: ClassVar[type[TeacherConfig]] = SigLIPConfig
    token_list = True


def _build_tower(source: OpenClipSource) -> Any:
    """The vision tower, with random weights only where these stay."""
    # The weights of the tower alone, which open_clip takes in training, are not wanted.
    vision_cfg = deepcopy(source.model_cfg["vision_cfg"]) | {"timm_model_pretrained": False}
    quick_gelu = source.model_cfg.get("quick_gelu", False)
    try:
        with seeded(loaded=source.weights != "none"):
            return _build_vision_tower(source.model_cfg["embed_dim"], vision_cfg, quick_gelu)
    except Exception as error:  # what a config states may break open_clip or timm anywhere
        raise TeacherError(
            f"model: open_clip builds no tower of {source.model!r}: {type(error).__name__}: "
            f"{shorten(str(error))}"
        ) from error


def _pixels(source: OpenClipSource, config: OpenClipConfig) -> Pixels:
    """The normalisation; says where its source and the tower disagree about the size."""
    where, stated = f"{config.kind} {config.model}", source.stated
    tower = _pair(source.model_cfg["vision_cfg"].get("image_size"))
    size = _pair(stated.preprocess.get("size"))
    if size and tower and size != tower and config.resolution is None:
        say_once(
            f"{where}: resolution {list(tower)}, that of the tower, is taken as open_clip does; "
            f"the preprocess_cfg of {stated.by} states {list(size)}; set resolution for another"
        )
    random = config.weights == "none"
    return choose_pixels(where, config, stated.preprocess, stated.by, stated.assumed, random=random)


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size in open_clip's configs."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else None


def _require_class_token(visual: Any, config: OpenClipConfig) -> None:
    """A class token that is pooled after the final norm, beside patch tokens."""
    if isinstance(visual, TimmModel):
        raise TeacherError(
            f"model: {config.model!r} has a timm tower; use kind siglip or open_clip"
        )
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        raise TeacherError(
            f"model: the tower of {config.model!r} ({type(visual).__name__}) has no map of patch "
            "tokens beside a class token; kind dfn_clip takes plain CLIP ViTs, open_clip any tower"
        )
    if visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise TeacherError(
            f"model: {config.model!r} does not pool a normed class token; kind dfn_clip takes "
            "plain CLIP ViTs, open_clip any tower"
        )


def _require_attention_pool(visual: Any, config: OpenClipConfig) -> None:
    """A timm ViT with an attention pool over its patch tokens."""
    trunk = getattr(visual, "trunk", None)
    if getattr(trunk, "attn_pool", None) is None or not hasattr(trunk, "patch_embed"):
        raise TeacherError(
            f"model: {config.model!r} has no attention pool over patch tokens, so it is not a "
            "SigLIP; use kind dfn_clip or open_clip"
        )


def _num_layers(visual: Any) -> int:
    """Blocks or stages that `forward_intermediates` numbers."""
    if isinstance(visual, TimmModel):
        return len(visual.trunk.feature_info)
    if isinstance(visual, VisionTransformer):
        return visual.transformer.layers
    return 5  # the stem and the stages of open_clip's ModifiedResNet


def _spec(visual: Any, summary: str) -> FeatureSpec:
    size = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    # Each library names its shapes differently, so the tower is run once, without storage.
    with torch.device("meta"), torch.no_grad():
        found = without_storage(visual).forward_intermediates(
            torch.empty(2, 3, height, width), indices=1
        )
    vector, spatial = found["image_features"], found["image_intermediates"][0]
    place = f"last block, {'after the' if _norms_tokens(visual) else 'without a'} final norm"
    if isinstance(visual, VisionTransformer) and _norms_tokens(visual):
        place += ", before the projection"
    return FeatureSpec(
        summary_dim=vector.shape[1],
        spatial_dim=spatial.shape[1],
        patch_size=height // spatial.shape[2],
        resolution=(height, width),
        spatial_from=place,
        summary_from={
            "embedding": "image embedding",
            "cls": "class token after the final norm",
            "pool": "attention pool",
        }[summary],
    )


def _norms_tokens(visual: Any) -> bool:
    """Whether a tower's final norm applies to its tokens, and not to what is pooled from them."""
    if isinstance(visual, TimmModel):
        norm = getattr(visual.trunk, "norm", None)
        return isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
    if not isinstance(visual, VisionTransformer):
        return False
    return visual.attn_pool is None and not visual.final_ln_after_pool


def _resize(visual: Any, resolution: tuple[int, int]) -> None:
    """Interpolates the position embeddings to another image size, bicubic and antialiased."""
    if isinstance(visual, TimmModel):
        visual.set_input_size(resolution)
        return
    if not isinstance(visual, VisionTransformer):
        raise TeacherError(
            f"resolution: a tower of {type(visual).__name__} takes only the size it was trained "
            f"at, {visual.image_size}"
        )
    h, w = visual.grid_size
    grid = resolution[0] // visual.patch_size[0], resolution[1] // visual.patch_size[1]
    # open_clip's own resize compares numbers of tokens only: it would take 4 x 16 for 8 x 8.
    prefix, table = visual.positional_embedding.detach().tensor_split([1])
    table = rearrange(table, "(h w) d -> 1 d h w", h=h, w=w)
    table = F.interpolate(table, grid, mode="bicubic", antialias=True)
    table = rearrange(table, "1 d h w -> (h w) d")
    visual.positional_embedding = nn.Parameter(torch.cat([prefix, table]))
    visual.grid_size, visual.image_size = grid, resolution
