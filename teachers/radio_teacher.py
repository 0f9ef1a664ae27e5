"""Teachers of the RADIO family: RADIOv2.5 and C-RADIO, from a local file in the public format.

The features are the published ones of the backbone: the output of the last block, after the final
norm only if the checkpoint has one. Heads for other teachers' features are ignored; use those
teachers instead.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.messages import did_you_mean, say_once
from teachers.pixels import say_conflict
from teachers.radio_architecture import RadioArchitecture, named_as
from teachers.radio_format import RadioCheckpoint, read_radio
from teachers.radio_hub import repository
from teachers.radio_models import PUBLISHED, build_trunk
from teachers.teacher import Teacher, TeacherConfig
from teachers.timm_teacher import layer_maps
from teachers.weights import fetch, load_strictly, on_meta


class RadioConfig(TeacherConfig):
    """A model of the RADIO family.

    Attributes:
        model: a published name, `radio_v2.5-l`; None for any other checkpoint in the public
            format, which needs `weights` and `resolution`.
        weights: a local file in the public format; a `.safetensors` file of the hub with its
            `config.json` beside it, or their folder, also in the layout of transformers' own
            `RadioModel`; or `none` for random weights.
        summary: the teachers whose class tokens are concatenated; None for the published ones. In
            the layout of transformers they are `cls_0`, `cls_1`, ... unless `model` or `args` in
            the `config.json` name them.
        resolution: (height, width) in pixels, multiples of the patch; None for the published one,
            or the `preferred_resolution` in the `config.json` of a checkpoint from the hub.
    """

    kind: str = "radio"
    model: str | None = None
    weights: str | None = None
    summary: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    resolution: tuple[PositiveInt, PositiveInt] | None = None


class RadioTeacher(Teacher):
    """A RADIO backbone; accepts every multiple of its patch size.

    Args:
        config: model, weights, summary and resolution.

    Raises:
        TeacherError: no such model, or a file that is not a RADIO checkpoint or does not fit.
    """

    Config: ClassVar[type[TeacherConfig]] = RadioConfig

    def __init__(self, config: RadioConfig) -> None:
        published = _find(config)
        checkpoint = _read(config, known=published is not None)
        architecture = _architecture(config, checkpoint, published)
        # No random weights where a file follows: those of a ViT-H take many seconds.
        with torch.device("meta") if checkpoint else nullcontext():
            network = build_trunk(architecture)
        stated = checkpoint.resolution if checkpoint else None
        spec = _spec(config, architecture, network, stated)
        super().__init__(
            spec, mean=architecture.mean, std=architecture.std, chunk_size=config.chunk_size
        )
        if checkpoint and published:
            ours, theirs = ({"mean": a.mean, "std": a.std} for a in (architecture, published))
            by = f"{config.model} as published"
            say_conflict(f"radio {config.model}", ours, str(config.weights), theirs, by)
            with torch.device("meta"):
                expected = _spec(config, published, build_trunk(published))
            if spec != expected:
                raise TeacherError(
                    f"weights: {config.weights} holds a model with {spec}; {config.model!r} has "
                    f"{expected}"
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
        """The patch tokens of some blocks, after the final norm if there is one."""
        return layer_maps(self.network, images, indices)


def _find(config: RadioConfig) -> RadioArchitecture | None:
    if config.model is None:
        return None
    if config.model not in PUBLISHED:
        raise TeacherError(
            f"model: {config.model!r} is unknown{did_you_mean(config.model, PUBLISHED)}; choose "
            f"one of {list(PUBLISHED)}, or leave it out and give weights"
        )
    return PUBLISHED[config.model][0]


def _read(config: RadioConfig, *, known: bool) -> RadioCheckpoint | None:
    """The checkpoint, if any; on the meta device only if the architecture is unknown."""
    if config.weights in (None, "none"):
        if not known:
            raise TeacherError("model: missing, and so are weights; give one or both")
        if config.weights is None and not on_meta():
            raise TeacherError(
                f"weights: {config.model!r} is not downloaded automatically. "
                f"{fetch(repository(str(config.model)), 'weights')}; or none for random weights"
            )
        return None
    return None if known and on_meta() else read_radio(Path(str(config.weights)))


def _architecture(
    config: RadioConfig, checkpoint: RadioCheckpoint | None, published: RadioArchitecture | None
) -> RadioArchitecture:
    """That of the checkpoint, else the published one; says which heads and names it lacks."""
    if checkpoint is None:
        return PUBLISHED[str(config.model)][0]
    if checkpoint.heads:
        say_once(
            f"weights {config.weights}: its heads for {', '.join(checkpoint.head_names)} are not "
            "read: the features are the backbone's own"
        )
    found = checkpoint.architecture
    named = named_as(found, published) if published else found
    if named != found:
        say_once(
            f"weights {config.weights}: its config.json names no teachers; those of "
            f"{config.model} are assumed: {', '.join(named.class_tokens)}"
        )
    return named


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


def _spec(
    config: RadioConfig,
    architecture: RadioArchitecture,
    network: NaFlexVit,
    stated: tuple[int, int] | None = None,
) -> FeatureSpec:
    """The spec; `stated` is the resolution that the checkpoint's config states."""
    patch = architecture.patch_size
    published = (PUBLISHED[config.model][1],) * 2 if config.model else None
    resolution = config.resolution or published or stated
    if stated and published and stated != published and config.resolution is None:
        say_once(
            f"radio {config.model}: resolution {list(published)}, as published, is taken; the "
            f"config.json beside {config.weights} states {list(stated)}"
        )
    if resolution is None:
        raise TeacherError(
            "resolution: missing; a checkpoint does not contain its intended size, so give "
            f"(height, width) in multiples of {patch} px, or a published model"
        )
    spec = FeatureSpec(
        summary_dim=network.embed_dim * len(_slots(config, architecture)),
        spatial_dim=network.embed_dim,
        patch_size=patch,
        resolution=resolution,
        any_resolution=True,
        spatial_from=f"last block, {'after the' if architecture.final_norm else 'without a'} final "
        "norm",
        summary_from=f"class tokens of {', '.join(config.summary or architecture.summary)}",
    )
    if any(length % patch for length in spec.resolution):
        raise TeacherError(f"resolution: {resolution} is not a multiple of the {patch} px patch")
    return spec
