"""FeatSharp (arXiv 2502.16025): adds detail from the encoder's maps of tiles to an upsampled map.

The upsampled map of the whole image (by joint bilateral upsampling in the paper) is right on
average, but blurred. The encoder's maps of tiles are sharp, but lack context and have seams. A
block of local attention and a SwiGLU learns what the tiles add to the upsampled map.
"""

from typing import Annotated, Any, Literal, Self

import torch
from einops import repeat
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from torch import Tensor, nn

from teachers.features import Features, FeatureSpec
from teachers.upsamplers.fusion import FusionBlock
from teachers.upsamplers.guidance import guidance
from teachers.upsamplers.jafar import JAFAR
from teachers.upsamplers.jbu import JBU
from teachers.upsamplers.resize import enlarge, resize, scaled
from teachers.upsamplers.tile import encode_tiles, num_tile_forwards
from teachers.upsamplers.upsampler import Encode, FactorConfig, UpsampledFeatures, Upsampler

Input = Literal["jbu", "tiles", "bilinear", "rgb", "jafar"]
_RGB_DIM = 16


class FeatSharpConfig(FactorConfig):
    """FeatSharp: by default the paper's block around bilinear interpolation.

    The paper's configuration is `inputs: [jbu, tiles]`, `layer_scale: 1.0e-6`, `sigma: 1`, which
    needs thousands of steps and was never better here (figures: recipes/README.md). The later
    public default is `inputs: [jafar, tiles]`, `norm: false`. Factor 1 only removes noise.

    Attributes:
        inputs: the maps to fuse, in order. The first must be a feature map. `jbu`, `jafar` and
            `bilinear` upsample the map of the whole image, `tiles` are the stitched maps of its
            tiles, `rgb` is the image itself.
        residual: what the fusion adds to: the `first` input, as published, or the `mean` of all
            feature maps.
        window: cells along each side of the attention window, odd.
        num_heads: attention heads.
        position: position encoding of the attention, see `FusionBlock`.
        norm: LayerNorm before attention and SwiGLU.
        layer_scale: initial LayerScale of the fusion.
        mlp_ratio: width of the fusion's SwiGLU, relative to the channels of all inputs, before the
            two thirds that are usual for a SwiGLU; 4 in the paper. 2 takes a third off the weights.
        sigma: initial width of the spatial kernel of joint bilateral upsampling; for `jbu`.
    """

    kind: str = "featsharp"
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)] = ("bilinear", "tiles")
    residual: Literal["first", "mean"] = "first"
    window: PositiveInt = 7
    num_heads: PositiveInt = 16
    position: Literal["alibi", "rope"] = "alibi"
    norm: bool = True
    layer_scale: NonNegativeFloat = 0.1
    mlp_ratio: PositiveFloat = 4.0
    sigma: PositiveFloat = 0.3

    @field_validator("inputs")
    @classmethod
    def _one_of_each(cls, inputs: tuple[Input, ...]) -> tuple[Input, ...]:
        if len(set(inputs)) < len(inputs):
            raise ValueError(f"{list(inputs)} names an input twice")
        if inputs[0] == "rgb":
            raise ValueError("the first input is the residual path and must not be rgb")
        return inputs


class FeatSharp(Upsampler):
    """Fuses an upsampled map with tiles.

    Args:
        spec: what the encoder returns and accepts.
        config: the options.
    """

    Config = FeatSharpConfig

    def __init__(self, spec: FeatureSpec, config: FeatSharpConfig) -> None:
        super().__init__(spec, config.factor)
        dim = spec.spatial_dim
        self.inputs = config.inputs
        if "jbu" in self.inputs:
            self.jbu = JBU(self.factor, sigma=config.sigma)
        if "jafar" in self.inputs:
            self.jafar = JAFAR(spec, self.factor)
        if "rgb" in self.inputs:
            self.rgb = nn.Linear(3, _RGB_DIM)
        if "tiles" in self.inputs:
            self.tile_position = nn.Parameter(torch.zeros(dim, *self.factor))
        self.fusion = FusionBlock(
            [_RGB_DIM if name == "rgb" else dim for name in self.inputs],
            num_heads=config.num_heads,
            window=config.window,
            position=config.position,
            norm=config.norm,
            layer_scale=config.layer_scale,
            mlp_ratio=config.mlp_ratio,
            residual=self._residual(config),
        )

    @classmethod
    def from_config(cls, config: Any, spec: FeatureSpec) -> Self:
        """Builds the upsampler of an encoder with `spec`."""
        return cls(spec, config)

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples; see `Upsampler.forward`."""
        if "tiles" in self.inputs:
            low, tiles = encode_tiles(images, encode, self.spec, self.factor)
            tiles = tiles + self._positions(low.spatial)
        else:
            low = encode(resize(images, self.spec.resolution))
            tiles = low.spatial  # not an input
        size = scaled((low.spatial.shape[-2], low.spatial.shape[-1]), self.factor)
        parts = [self._input(name, low.spatial, tiles, images, size) for name in self.inputs]
        return UpsampledFeatures(low, Features(low.summary, self.fusion(parts)))

    @staticmethod
    def _residual(config: FeatSharpConfig) -> list[int]:
        if config.residual == "first":
            return [0]
        return [i for i, name in enumerate(config.inputs) if name != "rgb"]

    def _input(
        self, name: Input, low: Tensor, tiles: Tensor, images: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """One input of the fusion, (B, channels, H, W)."""
        if name == "tiles":
            return tiles
        if name == "jbu":
            return self.jbu(low, guidance(images, size))
        if name == "jafar":
            return self.jafar.dense(low, images)
        if name == "rgb":
            return self.rgb(guidance(images, size).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return enlarge(low, self.factor)

    def _positions(self, low: Tensor) -> Tensor:
        """The learned vector of each tile at all of its cells."""
        h, w = low.shape[-2:]
        return repeat(self.tile_position, "d nh nw -> d (nh h) (nw w)", h=h, w=w)

    @property
    def num_forwards(self) -> int:
        """The whole image, and its tiles if they are an input."""
        return num_tile_forwards(self.factor) if "tiles" in self.inputs else 1
