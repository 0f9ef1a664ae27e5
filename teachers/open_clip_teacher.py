"""Teachers from open_clip: the vision towers of CLIP models (DFN CLIP) and of SigLIP models.

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
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from pydantic import PositiveInt
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.open_clip_source import find_source, locate_weights
from teachers.teacher import Teacher, TeacherConfig
from teachers.timm_teacher import layer_maps
from teachers.weights import load_strictly, read_tensors, seeded


class OpenClipConfig(TeacherConfig):
    """What both kinds have in common.

    Attributes:
        model: an open_clip model name, a small teacher that this package ships, or a local
            directory in hub layout (`open_clip_config.json` beside the weights).
        weights: a pretrained tag of open_clip, a local file or directory, or `none` for random
            weights. May be left out where `model` is a directory: its own weights.
        resolution: (height, width) in pixels to interpolate the position embeddings to; None for
            the resolution that the weights were trained at.
    """

    model: str
    weights: str | None = None
    resolution: tuple[PositiveInt, PositiveInt] | None = None


class DFNCLIPConfig(OpenClipConfig):
    """A CLIP teacher.

    Attributes:
        summary: `embedding`, the projected image embedding that the text tower is compared with,
            or `cls`, the class token before that projection.
    """

    kind: str = "dfn_clip"
    summary: Literal["embedding", "cls"] = "embedding"


class SigLIPConfig(OpenClipConfig):
    """A SigLIP teacher; its summary is the output of the attention pool."""

    kind: str = "siglip"


class OpenClipTeacher(Teacher):
    """The vision tower of an open_clip model; its subclasses say what is read from it."""

    def __init__(self, config: OpenClipConfig) -> None:
        source = find_source(config.model, config.weights)
        vision_cfg = deepcopy(source.model_cfg["vision_cfg"])
        with seeded(loaded=config.weights != "none"):
            visual: Any = _build_vision_tower(
                source.model_cfg["embed_dim"],
                vision_cfg,
                source.model_cfg.get("quick_gelu", False),
            )
        self._refuse(visual, config.model)
        path = locate_weights(source)
        if path is not None:
            load_strictly(visual, read_tensors(path, prefix="visual."), str(path))
        if config.resolution is not None:
            _resize(visual, config.resolution)
        preprocess = {**vars(PreprocessCfg()), **source.preprocess_cfg}
        super().__init__(
            self._spec(visual, config),
            mean=preprocess["mean"],
            std=preprocess["std"],
            chunk_size=config.chunk_size,
        )
        self.visual = visual

    @staticmethod
    def _refuse(visual: Any, model: str) -> None:
        """Raises TeacherError where the tower is of another family."""
        raise NotImplementedError

    @staticmethod
    def _spec(visual: Any, config: Any) -> FeatureSpec:
        raise NotImplementedError


class DFNCLIP(OpenClipTeacher):
    """A CLIP ViT, by default made for DFN CLIP: `ViT-H-14-378-quickgelu` with `dfn5b`.

    Spatial: the patch tokens after the final norm (`ln_post`) and before the projection, which is
    what open_clip itself returns as tokens and the space that the class token is pooled from.

    Args:
        config: model, weights and summary.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or another family.
    """

    Config: ClassVar[type[TeacherConfig]] = DFNCLIPConfig

    def __init__(self, config: DFNCLIPConfig) -> None:
        super().__init__(config)
        self.visual.output_tokens = True
        self.num_layers = self.visual.transformer.layers
        if config.summary == "cls":
            self.visual.proj = None

    def extract(self, images: Tensor) -> Features:
        """Runs the tower; see `Teacher.extract`."""
        summary, tokens = self.visual(images)
        h, w = self.spec.grid(*images.shape[-2:])
        return Features(summary, rearrange(tokens, "b (h w) d -> b d h w", h=h, w=w))

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The patch tokens of some blocks after the final norm, as those of the last one."""
        maps: list[Tensor] = self.visual.forward_intermediates(
            images, indices=list(indices), normalize_intermediates=True, intermediates_only=True
        )["image_intermediates"]
        return maps

    @staticmethod
    def _refuse(visual: Any, model: str) -> None:
        if isinstance(visual, TimmModel):
            raise TeacherError(f"model: {model!r} has a timm tower; take kind siglip or open_clip")
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            raise TeacherError(
                f"model: the tower of {model!r} ({type(visual).__name__}) has no map of patch "
                "tokens beside a class token; kind dfn_clip takes plain CLIP ViTs, open_clip any"
            )
        if visual.pool_type != "tok" or visual.final_ln_after_pool:
            raise TeacherError(
                f"model: {model!r} does not pool a normed class token; kind dfn_clip takes "
                "plain CLIP ViTs, open_clip any"
            )

    @staticmethod
    def _spec(visual: Any, config: DFNCLIPConfig) -> FeatureSpec:
        width = visual.ln_post.normalized_shape[0]
        return FeatureSpec(
            summary_dim=visual.output_dim if config.summary == "embedding" else width,
            spatial_dim=width,
            patch_size=_square(visual.patch_size),
            resolution=visual.image_size,
            spatial_from="last block, after the final norm, before the projection",
            summary_from="class token after the final norm"
            + (", projected" if config.summary == "embedding" else ""),
        )


class SigLIP(OpenClipTeacher):
    """A SigLIP ViT: `ViT-SO400M-14-SigLIP-384` with `webli`, or a SigLIP 2.

    Spatial: the patch tokens after the final norm, which enter the attention pool. Summary: what
    that pool returns. With 14 px patches and 384 px, 6 px at the right and bottom fill no patch;
    `resolution: [378, 378]` leaves none over and keeps the grid and the weights as they are.

    Args:
        config: model and weights.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or another family.
    """

    Config: ClassVar[type[TeacherConfig]] = SigLIPConfig

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__(config)
        self.num_layers = len(self.visual.trunk.blocks)

    def extract(self, images: Tensor) -> Features:
        """Runs the tower; see `Teacher.extract`."""
        trunk = self.visual.trunk
        tokens = trunk.forward_features(images)
        h, w = self.spec.grid(*images.shape[-2:])
        spatial = rearrange(tokens[:, trunk.num_prefix_tokens :], "b (h w) d -> b d h w", h=h, w=w)
        return Features(self.visual.head(trunk.forward_head(tokens)), spatial)

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The patch tokens of some blocks after the final norm, as those of the last one."""
        return layer_maps(self.visual.trunk, images, indices)

    @staticmethod
    def _refuse(visual: Any, model: str) -> None:
        trunk = getattr(visual, "trunk", None)
        if getattr(trunk, "attn_pool", None) is None or not hasattr(trunk, "patch_embed"):
            raise TeacherError(
                f"model: {model!r} has no attention pool over patch tokens, so it is no SigLIP; "
                "take kind dfn_clip or open_clip"
            )

    @staticmethod
    def _spec(visual: Any, config: OpenClipConfig) -> FeatureSpec:
        trunk = visual.trunk
        layers = [m for m in visual.head.modules() if isinstance(m, nn.Linear)]
        return FeatureSpec(
            summary_dim=layers[-1].out_features if layers else trunk.num_features,
            spatial_dim=trunk.embed_dim,
            patch_size=_square(trunk.patch_embed.patch_size),
            resolution=tuple(trunk.patch_embed.img_size),
            spatial_from="last block, after the final norm",
            summary_from="attention pool" + (", projected" if layers else ""),
        )


def _square(patch_size: Sequence[int]) -> int:
    if patch_size[0] != patch_size[1]:
        raise TeacherError(f"patches of {tuple(patch_size)} px: a teacher needs square ones")
    return patch_size[0]


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
