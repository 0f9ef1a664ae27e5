"""Teachers from timm: any model with a feature map."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.pixels import NormalisedConfig
from teachers.teacher import Teacher, TeacherConfig
from teachers.timm_grid import measured
from teachers.timm_source import build_network, pixels_of, resamples

_PLAIN = (VisionTransformer, Eva, NaFlexVit)  # their grid is known without a pass


class TimmConfig(NormalisedConfig):
    """A timm model.

    Attributes:
        model: a timm name with or without its tag, `vit_small_patch14_dinov2.lvd142m`; a local
            directory in hub layout (`config.json` beside the weights); or `efficientnet_lite2_260`,
            which this package ships.
        weights: None for those that timm publishes under that name (or that the directory holds),
            a local file or directory, or `none` for random weights. A `config.json` of timm beside
            a file states its normalisation and size.
        features: `norm`, the last map after the model's final norm; or the number of a block (a
            stage of a CNN), before that norm, counted from 0, or from the end if negative.
        summary: `cls`, the class token after the final norm; `pool`, the pooled input of the
            classifier; `none`; or `auto`, the class token if there is one, else the pooling.
        resolution: native (height, width) in pixels, which also allows any multiple of the patch
            size; positions of ViTs and SAM are interpolated. None for that of the weights. A CNN
            that pads takes any size: 9 x 9 cells for 260 px and a stride of 32.
    """

    kind: str = "timm"
    model: str
    weights: str | None = None
    features: Literal["norm"] | int = "norm"
    summary: Literal["auto", "cls", "pool", "none"] = "auto"
    resolution: tuple[PositiveInt, PositiveInt] | None = None


class TimmTeacher(Teacher):
    """A timm model without its classifier.

    A ViT accepts other resolutions if the recipe sets one and the model interpolates its
    positions. A CNN that pads accepts any size, and its cells are where `FeatureSpec.frame` says;
    other CNNs accept any multiple of their stride.

    Args:
        config: model, weights, features and summary.

    Raises:
        TeacherError: no such model or weights, weights that do not fit, or no such features.
    """

    Config: ClassVar[type[TeacherConfig]] = TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        network = build_network(config.model, config.weights, config.resolution)
        has_cls = getattr(network, "cls_token", None) is not None
        summary = config.summary
        if summary == "auto":
            summary = "cls" if has_cls else "pool"
        if summary == "cls" and not has_cls:
            raise TeacherError(f"summary: {config.model!r} has no class token; choose pool or none")
        mean, std = pixels_of(config, config.model, config.weights, network)
        super().__init__(
            _spec(network, config, summary), mean=mean, std=std, chunk_size=config.chunk_size
        )
        self.network = network
        self.summary = summary
        self.norm = config.features == "norm"
        self.index = -1 if config.features == "norm" else config.features
        self.num_layers = len(network.feature_info)

    def extract(self, images: Tensor) -> Features:
        """Runs the model; see `Teacher.extract`."""
        final, maps = self.network.forward_intermediates(
            images, indices=[self.index], norm=self.norm, output_fmt="NCHW"
        )
        if self.summary == "none":
            return Features(None, maps[0])
        if self.summary == "cls":
            return Features(final[:, 0], maps[0])
        return Features(self.network.forward_head(final, pre_logits=True), maps[0])

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of blocks (stages of a CNN); those of a ViT after its final norm."""
        return layer_maps(self.network, images, indices)


def layer_maps(network: Any, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The maps of some blocks of a timm model, after its final norm if it fits them."""
    maps: list[Tensor] = network.forward_intermediates(
        images, indices=list(indices), norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return maps


def _place(network: Any, features: Literal["norm"] | int, info: dict[str, Any]) -> str:
    """A description of where the map is taken."""
    where = "last block" if info is network.feature_info[-1] else info["module"]
    norm = getattr(network, "norm", None)
    if hasattr(network, "neck"):  # timm's SAM
        end = "the neck"
    elif isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
        end = "the final norm"
    else:
        return f"{where}, without a final norm"
    return f"{where}, {'after' if features == 'norm' else 'before'} {end}"


def _spec(network: Any, config: TimmConfig, summary: str) -> FeatureSpec:
    infos = network.feature_info
    index = -1 if config.features == "norm" else config.features
    if not -len(infos) <= index < len(infos):
        raise TeacherError(
            f"features: {config.model!r} has no map {index}; choose norm or one of "
            f"0 to {len(infos) - 1}"
        )
    info = infos[index]
    channels = info["num_chs"]
    if config.features == "norm":
        channels = info.get("num_chs_norm", channels)
    fixed = network.pretrained_cfg.get("fixed_input_size", False)
    if config.resolution is not None and resamples(network):
        fixed = False
    patch_embed = getattr(network, "patch_embed", None)
    native = getattr(patch_embed, "img_size", None) or network.pretrained_cfg["input_size"][1:]
    spec = FeatureSpec(
        summary_dim={
            "cls": getattr(network, "embed_dim", network.num_features),
            "pool": getattr(network, "head_hidden_size", network.num_features),
            "none": None,
        }[summary],
        spatial_dim=channels,
        patch_size=info["reduction"],
        resolution=config.resolution or tuple(native),
        any_resolution=getattr(network, "dynamic_img_size", not fixed),
        spatial_from=_place(network, config.features, info),
        summary_from={
            "cls": "class token after the final norm",
            "pool": "the model's own pooling",
            "none": "",
        }[summary],
    )
    if not isinstance(network, _PLAIN):
        spec = measured(network, spec, config.features, config.model)
    if spec.padding is None and any(side % spec.patch_size for side in config.resolution or ()):
        raise TeacherError(
            f"resolution: {config.resolution} is not a multiple of the {spec.patch_size} px "
            f"patches of {config.model!r}"
        )
    return spec
