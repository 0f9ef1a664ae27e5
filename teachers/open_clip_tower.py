"""Teachers from open_clip: the vision tower of any of its models, by what all of them offer."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.open_clip_teacher import OpenClipConfig, OpenClipTeacher
from teachers.teacher import TeacherConfig
from teachers.weights import without_storage


class OpenClipTowerConfig(OpenClipConfig):
    """Any open_clip tower; its summary is the projected image embedding."""

    kind: str = "open_clip"


class OpenClipTower(OpenClipTeacher):
    """Any tower of open_clip: EVA, ConvNeXt, CLIPA, CoCa, MobileCLIP, the ResNets of CLIP, ...

    Spatial: the last block's (or stage's) map, after the final norm where that takes it: a norm
    behind the pooling does not. Summary: the image embedding that the text tower is compared with.
    `dfn_clip` and `siglip` give the same of plain CLIP ViTs and SigLIPs, and their other summary.

    Args:
        config: model and weights.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or a tower without a map.
    """

    Config: ClassVar[type[TeacherConfig]] = OpenClipTowerConfig

    def __init__(self, config: OpenClipTowerConfig) -> None:
        super().__init__(config)
        self.normed = _norms_tokens(self.visual)
        trunk = getattr(self.visual, "trunk", None)
        if trunk is not None:
            self.num_layers = len(trunk.feature_info)
        elif isinstance(self.visual, VisionTransformer):
            self.num_layers = self.visual.transformer.layers
        else:
            self.num_layers = 5  # the stem and the stages of open_clip's ModifiedResNet

    def extract(self, images: Tensor) -> Features:
        """Runs the tower; see `Teacher.extract`."""
        found = self.visual.forward_intermediates(
            images, indices=[self.num_layers - 1], normalize_intermediates=self.normed
        )
        return Features(found["image_features"], found["image_intermediates"][0])

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of some blocks or stages, as that of the last one."""
        maps: list[Tensor] = self.visual.forward_intermediates(
            images,
            indices=list(indices),
            normalize_intermediates=self.normed,
            intermediates_only=True,
        )["image_intermediates"]
        return maps

    @staticmethod
    def _refuse(visual: Any, model: str) -> None:
        trunk = getattr(visual, "trunk", visual)
        if not hasattr(trunk, "forward_intermediates"):
            raise TeacherError(f"model: open_clip gives no feature maps of {model!r}")

    @staticmethod
    def _spec(visual: Any, config: OpenClipConfig) -> FeatureSpec:
        size = visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        # Towers say their shapes in as many ways as there are libraries behind them: one is run.
        with torch.device("meta"), torch.no_grad():
            found = without_storage(visual).forward_intermediates(
                torch.empty(2, 3, height, width), indices=1
            )
        summary, spatial = found["image_features"], found["image_intermediates"][0]
        return FeatureSpec(
            summary_dim=summary.shape[1],
            spatial_dim=spatial.shape[1],
            patch_size=height // spatial.shape[2],
            resolution=(height, width),
            spatial_from="last block, "
            + ("after the final norm" if _norms_tokens(visual) else "without a final norm"),
            summary_from="image embedding",
        )


def _norms_tokens(visual: Any) -> bool:
    """Whether a tower's final norm is of the tokens, and not of what was pooled from them."""
    if isinstance(visual, TimmModel):
        norm = getattr(visual.trunk, "norm", None)
        return isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
    if not isinstance(visual, VisionTransformer):
        return False
    return visual.attn_pool is None and not visual.final_ln_after_pool
