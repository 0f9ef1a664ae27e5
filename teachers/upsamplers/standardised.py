"""Any upsampler in the space where FeatSharp trains it: PHI-S, less the encoder's fixed pattern.

A ViT's map carries a pattern that belongs to the position in its input, not to the image. One
learned vector a cell, added to everything the encoder returns, takes it away: views of one image
agree only without it (arXiv 2502.16025, section 3.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.features import Features
from teachers.phi_s import PhiS
from teachers.upsamplers.precision import no_autocast
from teachers.upsamplers.upsampler import Encode, UpsampledFeatures, Upsampler


class PositionBias(nn.Module):
    """A learned map that is added to every map of the encoder.

    A shift of all its cells in one channel changes nothing that consistency could see.

    Args:
        dim: channels D.
        grid: (h, w) cells of the encoder's map.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(dim, *grid))

    def forward(self, maps: Tensor) -> Tensor:
        """Adds it to maps (B, D, h', w'), interpolated where their grid is another."""
        bias, size = self.map[None], maps.shape[-2:]
        if bias.shape[-2:] != size:
            bias = F.interpolate(bias, size, mode="bilinear", align_corners=False, antialias=True)
        return maps + bias


class Standardised(Upsampler):
    """An upsampler with the encoder's PHI-S and its position bias inside.

    Args:
        inner: works on standardised maps, and keeps their channels.
        phi_s: fitted to the encoder, or about to be loaded.
        bias: whether a position bias is learned.

    Raises:
        TeacherError: the inner upsampler changes the number of channels.
    """

    def __init__(self, inner: Upsampler, phi_s: PhiS, *, bias: bool = True) -> None:
        super().__init__(inner.spec, inner.factor)
        spec = inner.spec
        if inner.spatial_dim != spec.spatial_dim:
            raise TeacherError(
                f"an upsampler of {spec.spatial_dim} to {inner.spatial_dim} channels has no "
                "standardised form: the encoder's features could not be found back"
            )
        self.inner = inner
        self.phi_s = phi_s
        self.bias = PositionBias(spec.spatial_dim, spec.grid(*spec.resolution)) if bias else None

    def standardise(self, maps: Tensor) -> Tensor:
        """The encoder's map (B, D, h, w) in PHI-S space, without its fixed pattern."""
        # Standardised in float32 under any autocast: features may lie far from zero.
        with no_autocast(maps):
            maps = self.phi_s(maps.float())
        return maps if self.bias is None else self.bias(maps)

    def standardised(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples, and stays in the standardised space.

        Args:
            images: (B, 3, H, W) in [0, 1], at any size.
            encode: the encoder, in its own space.
        """

        def encode_standardised(inputs: Tensor) -> Features:
            features = encode(inputs)
            return features._replace(spatial=self.standardise(features.spatial))

        return self.inner(images, encode_standardised)

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples, in the encoder's own space; `low` too is without the fixed pattern."""
        low, high = self.standardised(images, encode)
        with no_autocast(images):
            low, high = (
                f._replace(spatial=self.phi_s.inverse(f.spatial.float())) for f in (low, high)
            )
        return UpsampledFeatures(low, high)

    @property
    def num_forwards(self) -> int:
        """The inner one's."""
        return self.inner.num_forwards
