"""A teacher: a frozen encoder that owns its pixel normalisation.

To add one, subclass `Teacher`, build the network in `__init__` and implement `extract`. A recipe
names the class by import path, `kind: my_package.module:MyTeacher`. README.md beside this module
has a complete example, and `teachers.testing.check_teacher` tests one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, ClassVar, Self, TypeVar, final

import torch
from pydantic import BeforeValidator, PositiveInt, SerializeAsAny
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from teachers.config import StrictConfig
from teachers.errors import TeacherError
from teachers.features import Features, FeatureSpec
from teachers.normalization import warn_of_range
from teachers.upsamplers.build import parse_upsamplers
from teachers.upsamplers.upsampler import Upsampler, UpsamplerConfig

_T = TypeVar("_T")


class TeacherConfig(StrictConfig):
    """The keys of every teacher's recipe entry; a teacher with its own options subclasses it.

    Attributes:
        kind: a built-in name, or the import path `package.module:Class` of a user's class.
        chunk_size: images per pass of the encoder; None for all of a batch. Bounds memory.
        upsampler: upsamples the teacher's map: a mapping with a kind, or the path or name of a
            trained one. A list of different factors gives the map at every resolution, see
            `MultiScaleTeacher`. None for the encoder's own map.
    """

    kind: str
    chunk_size: PositiveInt | None = None
    upsampler: Annotated[
        SerializeAsAny[UpsamplerConfig] | tuple[SerializeAsAny[UpsamplerConfig], ...] | None,
        BeforeValidator(parse_upsamplers),
    ] = None

    def licence(self) -> str | None:
        """The licence of the weights, where the class knows it; see `catalog.licence_of`.

        A subclass may have a field or a class variable `licence: str` in its place.
        """
        return None


class Teacher(nn.Module, ABC):
    """A frozen encoder: images in [0, 1] in, float32 `Features` out.

    Always in eval mode and without gradients, even if its parent module trains.

    Attributes:
        num_layers: number of blocks or stages that `layers` can return; 0 for none.
        strides: of their maps, in pixels, where these are a pyramid, which a detector then takes in
            the place of one that it makes of a single map; else empty.
        wraps: whether a model inside takes the images as they are, and looks at them itself.

    Args:
        spec: what the encoder returns and accepts.
        mean: per-channel mean of the encoder's pixel normalisation.
        std: per-channel standard deviation of the same.
        chunk_size: images per pass of the encoder; None for all of a batch.
    """

    Config: ClassVar[type[TeacherConfig]] = TeacherConfig
    wraps: ClassVar[bool] = False

    mean: Tensor  # (1, 3, 1, 1)
    std: Tensor  # (1, 3, 1, 1)
    compute_dtype: torch.dtype = torch.float32
    num_layers: int = 0
    strides: tuple[int, ...] = ()

    def __init__(
        self,
        spec: FeatureSpec,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.chunk_size = chunk_size
        self.normalization = tuple(map(float, mean)), tuple(map(float, std))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Builds the teacher from its `Config`; override where the constructor differs."""
        return cls(config)  # type: ignore[call-arg]

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Runs the encoder.

        Args:
            images: (B, 3, H, W), normalised with `mean` and `std`, of a size that `spec` accepts.

        Returns:
            Features with the shapes of `spec`, in any floating dtype.
        """

    @final  # type: ignore[misc]
    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            Features with summary (B, D_summary) or None and spatial (B, D, h, w), float32.

        Raises:
            ValueError: `spec` does not accept the image size.
            RuntimeError: `extract` returned no Features, or other shapes than those of `spec`.
        """
        grid = self.spec.grid(*images.shape[-2:])
        parts = self._in_chunks(self.extract, images)
        if not all(isinstance(part, Features) for part in parts):
            raise RuntimeError(
                f"{type(self).__name__}.extract returned a {type(parts[0]).__name__}, not Features"
            )
        summary = None
        if parts[0].summary is not None:
            summary = torch.cat([p.summary for p in parts if p.summary is not None]).float()
        features = Features(summary, torch.cat([p.spatial for p in parts]).float())
        self._check(features, len(images), grid)
        return features

    @final
    @torch.no_grad()
    def layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """The maps of several layers, for heads that read more than the last one.

        Args:
            images: (B, 3, H, W) in [0, 1].
            indices: increasing numbers below `num_layers`, see `even_layers`.

        Returns:
            A map (B, D, h, w) for each index, float32; D, h and w may differ between layers.

        Raises:
            ValueError: `spec` does not accept the image size.
            TeacherError: this encoder returns no layers, or not these.
            RuntimeError: `extract_layers` did not return a map for each index.
        """
        self.spec.grid(*images.shape[-2:])
        chosen = list(indices)
        if not self.num_layers:
            raise TeacherError(
                f"{type(self).__name__} returns its last map only, no layers; use a probe that "
                "reads one map, linear"
            )
        if chosen != sorted(set(chosen)) or not set(chosen) <= set(range(self.num_layers)):
            raise TeacherError(
                f"layers: expected increasing numbers from 0 to {self.num_layers - 1}, got {chosen}"
            )
        parts = self._in_chunks(lambda chunk: self.extract_layers(chunk, chosen), images)
        for part in parts:
            if len(part) != len(chosen) or any(each.ndim != 4 for each in part):
                raise RuntimeError(
                    f"{type(self).__name__}.extract_layers: expected a map (B, D, h, w) for each "
                    f"of the layers {chosen}, got shapes {[tuple(each.shape) for each in part]}"
                )
        return [torch.cat(maps).float() for maps in zip(*parts, strict=True)]

    def extract_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Runs the encoder for the maps of its layers; override it together with `num_layers`.

        Args:
            images: (B, 3, H, W), as for `extract`.
            indices: increasing layer numbers.

        Returns:
            A map (B, D, h, w) for each index, after the encoder's final norm where that fits, in
            any floating dtype.
        """
        raise TeacherError(f"{type(self).__name__} sets num_layers but has no extract_layers")

    def _in_chunks(self, run: Callable[[Tensor], _T], images: Tensor) -> list[_T]:
        """Normalises the images and runs the encoder on each chunk of them."""
        if self.training:  # fresh from its constructor
            self.freeze()
        if not self.wraps:
            warn_of_range(images, self)
        chunks = images.split(self.chunk_size or max(1, len(images)))
        with self._precision(images.device.type):
            return [run((chunk - self.mean) / self.std) for chunk in chunks]

    def cast(self, dtype: torch.dtype) -> Self:
        """Stores the encoder's matrices in `dtype` and computes in it; features stay float32.

        Norms, biases, position tables and `fp32_modules` stay in float32, and norms compute in it:
        in bfloat16 they collapse the features of large encoders (reported for DINOv3-7B).

        Args:
            dtype: float32, bfloat16 or float16.

        Raises:
            TeacherError: another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TeacherError(
                f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}"
            )
        teachers = [module for module in self.modules() if isinstance(module, Teacher)]
        kept = {m for t in teachers for part in t.fp32_modules() for m in part.modules()}
        for module in self.modules():
            if isinstance(module, Teacher):
                module.compute_dtype = dtype
            if module in kept:
                continue
            if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)):
                for parameter in module.parameters(recurse=False):
                    if parameter.ndim > 1:
                        parameter.data = parameter.data.to(dtype)
        return self

    def fp32_modules(self) -> list[nn.Module]:
        """Modules that `cast` leaves in float32: upsamplers, which were trained in it."""
        return [module for module in self.modules() if isinstance(module, Upsampler)]

    def _precision(self, device_type: str) -> AbstractContextManager[Any]:
        """Autocast to the teacher's own precision, which replaces the caller's."""
        if device_type == "meta":  # unknown to autocast
            return nullcontext()
        if self.compute_dtype == torch.float32:
            return torch.autocast(device_type, enabled=False)
        return torch.autocast(device_type, dtype=self.compute_dtype)

    def _check(self, features: Features, batch: int, grid: tuple[int, int]) -> None:
        summary = None if features.summary is None else tuple(features.summary.shape)
        promised = None if self.spec.summary_dim is None else (batch, self.spec.summary_dim)
        for name, came, expected in (
            ("summary", summary, promised),
            ("spatial", tuple(features.spatial.shape), (batch, self.spec.spatial_dim, *grid)),
        ):
            if came != expected:
                raise RuntimeError(
                    f"{type(self).__name__}.extract returned a {name} of shape {came}, "
                    f"expected {expected} by its spec"
                )

    @final
    def freeze(self) -> Self:
        """Sets eval mode and turns gradients off."""
        super().train(False)
        return self.requires_grad_(False)

    @final
    def train(self, mode: bool = True) -> Self:
        """Freezes, whatever the mode: a parent module's `train()` must not unfreeze a teacher."""
        return self.freeze()


def even_layers(num_layers: int, count: int = 4) -> tuple[int, ...]:
    """The last layers of `count` equal parts of an encoder: 2, 5, 8 and 11 of 12.

    These are the layers that DINOv2 and Probe3D read of a ViT-B. Of a ViT-L they read 4, 11, 17
    and 23, where this gives 5, 11, 17 and 23.
    """
    return tuple(num_layers * part // count - 1 for part in range(1, count + 1))
