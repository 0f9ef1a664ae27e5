"""Teachers from Hugging Face's transformers, an extra: `pip install 'featsharp-distill[hf]'`.

Any vision model that `AutoModel` knows, and the vision tower of any model whose config has a
`vision_config` (CLIP, SigLIP, PaliGemma, LLaVA, ...). No code of a repository is run.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.hf_pixels import Preprocessing, choose_size, read_preprocessing
from teachers.messages import say_once, took
from teachers.pixels import NormalisedConfig, choose_pixels
from teachers.teacher import Teacher, TeacherConfig
from teachers.weights import download_failed, fetch, on_meta, seeded, shorten, weights_in

# What transformers raises for files that are missing, damaged or of another kind.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    *(SafetensorError, UnpicklingError),
)
_WEIGHT_NAMES = (  # transformers' own order
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


class HFConfig(NormalisedConfig):
    """A model of transformers.

    Attributes:
        model: a repository on the hub, `facebook/dinov2-base`, or a local directory of the same
            layout (`config.json`, `preprocessor_config.json` and the weights).
        weights: None for those of the repository or directory, or `none` for random weights.
        summary: `pool`, the model's `pooler_output`; `cls`, its first token; `none`; or `auto`,
            the first of these that the model has.
        resolution: (height, width) in pixels to interpolate positions to; None for the model's own.
    """

    kind: str = "hf"
    model: str
    weights: Literal["none"] | None = None
    summary: Literal["auto", "pool", "cls", "none"] = "auto"
    resolution: tuple[PositiveInt, PositiveInt] | None = None


class HFTeacher(Teacher):
    """A vision model of transformers; its map is `last_hidden_state`.

    It is taken after the final norm for ViT, DINOv2 and SigLIP, but before it for CLIP.

    Args:
        config: model, weights and summary.

    Raises:
        TeacherError: transformers is not installed, no such model, or a model without a map.
    """

    Config: ClassVar[type[TeacherConfig]] = HFConfig
    flips: bool = False  # whether the model takes blue first

    def __init__(self, config: HFConfig) -> None:
        described = _describe(config.model)
        preprocessing = _preprocessing(config.model)
        mean, std = choose_pixels(
            f"hf {config.model}",
            config,
            preprocessing.stated,
            preprocessing.source,
            preprocessing.assumed,
            random=config.weights == "none",
        )
        own_size = getattr(described, "image_size", None)
        size = choose_size(config.model, own_size, preprocessing, config.resolution)
        shapes = _infer_shapes(described, size, config)
        network, missing = _build(described, config)
        summary = _choose_summary(
            config, shapes, pooler=shapes.pooled_dim is not None and not missing
        )
        super().__init__(
            FeatureSpec(
                summary_dim={"pool": shapes.pooled_dim, "cls": shapes.dim, "none": None}[summary],
                spatial_dim=shapes.dim,
                patch_size=size[0] // shapes.grid[0],
                resolution=size,
                native_grid=shapes.grid,
                spatial_from=f"last_hidden_state of {type(network).__name__}",
                summary_from={"pool": "pooler_output", "cls": "first token", "none": ""}[summary],
            ),
            mean=mean,
            std=std,
            chunk_size=config.chunk_size,
        )
        self.network, self.summary, self.prefix = network, summary, shapes.num_prefix_tokens
        self.interpolates = config.resolution is not None
        if preprocessing.flips:  # part of the fingerprint, of such models only
            self.flips = True

    def extract(self, images: Tensor) -> Features:
        """Runs the model; see `Teacher.extract`."""
        if self.flips:
            images = images.flip(1)
        output = _run(self.network, images, interpolate=self.interpolates)
        hidden, summary = output.last_hidden_state, None
        if self.summary == "pool":
            summary = output.pooler_output.flatten(1)
        elif self.summary == "cls":
            summary = hidden[:, 0]
        if self.prefix is not None:
            patches = hidden[:, self.prefix :].transpose(1, 2)
            hidden = patches.unflatten(2, self.spec.grid(*images.shape[-2:]))
        return Features(summary, hidden)


class _Shapes(NamedTuple):
    """The shapes of one pass on the meta device.

    Attributes:
        dim: channels of the map.
        grid: its (h, w) cells.
        num_prefix_tokens: tokens before those of the patches; None if the output is a map.
        pooled_dim: channels of `pooler_output`; None if there is none.
    """

    dim: int
    grid: tuple[int, int]
    num_prefix_tokens: int | None
    pooled_dim: int | None


def _library() -> Any:
    """transformers, which is an optional dependency."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise TeacherError(
            f"kind hf requires Hugging Face's transformers ({error}); run "
            "`pip install 'featsharp-distill[hf]'`"
        ) from None


def _fetched(model: str, what: str, read: Callable[[], Any]) -> Any:
    """The result of `read`, which reads a repository or directory; its errors as one message."""
    try:
        return read()
    except _UNREADABLE as error:
        if Path(model).is_dir() or not isinstance(error, OSError):
            raise TeacherError(f"model: {what} of {model}: {shorten(str(error))}") from None
        asked = f"{what} of Hugging Face's {model!r}"
        raise download_failed(asked, fetch(model, "model"), error) from None


def _describe(model: str) -> Any:
    """The config of the vision model."""
    transformers = _library()
    read = transformers.AutoConfig.from_pretrained
    config = _fetched(model, "config.json", lambda: read(model, trust_remote_code=False))
    if config.model_type == "radio":  # it normalises pixels itself and has several class tokens
        cure = f"weights: {model}" if Path(model).is_dir() else fetch(model, "weights")
        raise TeacherError(f"model: {model} is of the RADIO family; use kind: radio. {cure}")
    return getattr(config, "vision_config", config)


def _preprocessing(model: str) -> Preprocessing:
    """What is stated of the pixels."""
    return read_preprocessing(_library(), model, lambda what, read: _fetched(model, what, read))


def _build(described: Any, config: HFConfig) -> tuple[Any, bool]:
    """The network, and whether its pooler is random because the repository lacks it."""
    auto = _library().AutoModel
    if config.weights == "none" or on_meta():
        with seeded():
            return auto.from_config(described, dtype=torch.float32), False
    if Path(config.model).is_dir():
        found = weights_in(Path(config.model))
        chosen = next((name for name in _WEIGHT_NAMES if name in found), None)
        if chosen:
            took(f"weights {config.model}", chosen, found, "transformers' choice")
    network, report = _fetched(
        config.model,
        "the weights",
        lambda: auto.from_pretrained(
            config.model,
            config=described,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        ),
    )
    wrong = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lost = sorted(key for key in wrong if not key.startswith("pooler."))
    if lost:
        raise TeacherError(
            f"weights: {config.model} lacks {len(lost)} tensors of its {type(network).__name__}, "
            f"such as {lost[0]}"
        )
    if wrong and config.summary == "auto":
        say_once(f"hf {config.model}: its weights lack the pooler, so that is not the summary")
    return network, bool(wrong)


def _infer_shapes(described: Any, size: tuple[int, int], config: HFConfig) -> _Shapes:
    """Runs the model once without storage."""
    try:
        with torch.device("meta"), torch.no_grad():
            network = _library().AutoModel.from_config(described, dtype=torch.float32).eval()
            images = torch.empty(2, 3, *size)
            output = _run(network, images, interpolate=config.resolution is not None)
        hidden: Tensor = output.last_hidden_state
    except Exception as error:  # a model of another kind of input may raise anything
        raise TeacherError(
            f"model: {config.model} ({type(described).__name__}) returns no last_hidden_state for "
            f"images of {size[0]} x {size[1]} px alone: {shorten(str(error))}"
        ) from None
    pooled = getattr(output, "pooler_output", None)
    pooled_dim = None if pooled is None else pooled.flatten(1).shape[1]
    if hidden.ndim == 4:
        return _Shapes(hidden.shape[1], (hidden.shape[2], hidden.shape[3]), None, pooled_dim)
    grid = _grid(described, size, hidden.shape[1])
    if grid is None:
        raise TeacherError(
            f"model: {config.model} returns {hidden.shape[1]} tokens for {size[0]} x {size[1]} px, "
            "which is not a grid of patches"
        )
    return _Shapes(hidden.shape[2], grid, hidden.shape[1] - grid[0] * grid[1], pooled_dim)


def _grid(described: Any, size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """The (h, w) cells of a token list; a prefix is possible only if the patch size is known."""
    patch = getattr(described, "patch_size", None)
    if isinstance(patch, int):
        h, w = size[0] // patch, size[1] // patch
        if h * w <= tokens:
            return h, w
    side = isqrt(tokens)  # cells of a Swin's stages are larger than its patches
    return (side, side) if side * side == tokens and size[0] == size[1] else None


def _choose_summary(config: HFConfig, shapes: _Shapes, *, pooler: bool) -> str:
    there = {"pool": pooler, "cls": bool(shapes.num_prefix_tokens), "none": True}
    if config.summary == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[config.summary]:
        known = ", ".join(name for name, is_there in there.items() if is_there)
        raise TeacherError(f"summary: {config.model} has no {config.summary}; choose {known}")
    return config.summary


def _run(network: Any, images: Tensor, *, interpolate: bool) -> Any:
    """Runs the network, with interpolated positions if asked and supported."""
    asked = interpolate and "interpolate_pos_encoding" in signature(network.forward).parameters
    options = {"interpolate_pos_encoding": True} if asked else {}
    return network(pixel_values=images, **options)
