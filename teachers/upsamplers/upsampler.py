"""The interface of feature upsamplers.

An upsampler gets the encoder as a function, so that it can encode tiles of the image too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from teachers.config import StrictConfig
from teachers.features import Features, FeatureSpec
from teachers.upsamplers.resize import Factor, resize, scaled

Encode = Callable[[Tensor], Features]


class UpsampledFeatures(NamedTuple):
    """The encoder's own features and the upsampled ones.

    Attributes:
        low: features of the whole image at the encoder's native resolution.
        high: the same summary, and a map (B, `Upsampler.spatial_dim`, fh * h, fw * w).
    """

    low: Features
    high: Features


class UpsamplerConfig(StrictConfig):
    """An upsampler's entry in a recipe."""

    kind: str


class FactorConfig(UpsamplerConfig):
    """The entry of an upsampler whose factor is given in the recipe.

    Attributes:
        factor: how many times denser the map becomes; one number, or [height, width]. For
            upsamplers that encode tiles, it is the number of tiles too.
    """

    factor: Factor


class Upsampler(nn.Module, ABC):
    """Makes the map of an encoder denser.

    Args:
        spec: what the encoder returns and accepts.
        factor: (fh, fw), how many times denser the output grid is, per axis.
    """

    Config: ClassVar[type[UpsamplerConfig]] = UpsamplerConfig

    def __init__(self, spec: FeatureSpec, factor: tuple[int, int]) -> None:
        super().__init__()
        self.spec = spec
        self.factor = factor

    @classmethod
    def from_config(cls, config: Any, spec: FeatureSpec) -> Self:
        """Builds the upsampler for `spec`; passes the config's options but `kind` by name."""
        return cls(spec, **{name: value for name, value in config if name != "kind"})

    @abstractmethod
    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples.

        Args:
            images: (B, 3, H, W) in [0, 1], at any size; the upsampler resizes to what it needs.
            encode: the encoder; images (N, 3, h, w) at its native resolution to `Features`.
        """

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the high map corresponds to."""
        return scaled(self.spec.resolution, self.factor)

    @property
    def spatial_dim(self) -> int:
        """Channels of the high map; by default the encoder's."""
        return self.spec.spatial_dim

    @property
    @abstractmethod
    def num_forwards(self) -> int:
        """Encoder passes at native resolution for one image."""


class SinglePassUpsampler(Upsampler):
    """An upsampler of the encoder's map alone, or of map and image, without further passes."""

    @abstractmethod
    def dense(self, features: Tensor, images: Tensor) -> Tensor:
        """Upsamples a map.

        Args:
            features: (B, D, h, w), the encoder's map of the images.
            images: (B, 3, H, W) in [0, 1], at any size.

        Returns:
            (B, D, fh * h, fw * w), within the range of the features.
        """

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Encodes the image at native resolution and upsamples its map."""
        low = encode(resize(images, self.spec.resolution))
        return UpsampledFeatures(low, Features(low.summary, self.dense(low.spatial, images)))

    @property
    def num_forwards(self) -> int:
        """One."""
        return 1
