"""Runs any upsampler in the space where FeatSharp trains it: PHI-S, without positional bias.

The maps of a ViT contain a pattern that depends on the position in the input, not on the image.
Views of one image agree only without it, so one learned vector per cell is added to all maps of the
encoder to remove it (arXiv 2502.16025, section 3.3).
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

    The consistency loss does not determine its mean over cells.

    Args:
        dim: channels D.
        grid: (h, w) cells of the encoder's map.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(dim, *grid))

    def forward(self, maps: Tensor) -> Tensor:
        """Adds the bias, interpolated if the grid differs, to maps (B, D, h', w')."""
        bias, size = self.map[None], maps.shape[-2:]
        if bias.shape[-2:] != size:
            bias = F.interpolate(bias, size, mode="bilinear", align_corners=False, antialias=True)
        return maps + bias


class Standardised(Upsampler):
    """An upsampler together with the encoder's PHI-S and position bias.

    Args:
        inner: the upsampler of standardised maps; must keep the number of channels.
        phi_s: fitted to the encoder, or to be loaded later.
        bias: whether to learn a position bias.

    Raises:
        TeacherError: the inner upsampler changes the number of channels.
    """

    def __init__(self, inner: Upsampler, phi_s: PhiS, *, bias: bool = True) -> None:
        super().__init__(inner.spec, inner.factor)
        spec = inner.spec
        if inner.spatial_dim != spec.spatial_dim:
            raise TeacherError(
                f"an upsampler from {spec.spatial_dim} to {inner.spatial_dim} channels cannot run "
                "in standardised space: its output cannot be mapped back to the encoder's features"
            )
        self.inner = inner
        self.phi_s = phi_s
        self.bias = PositionBias(spec.spatial_dim, spec.grid(*spec.resolution)) if bias else None

    def standardise(self, maps: Tensor) -> Tensor:
        """Converts the encoder's map (B, D, h, w) to PHI-S space and adds the position bias."""
        # In float32 under autocast too: the mean of features may be far from zero.
        with no_autocast(maps):
            maps = self.phi_s(maps.float())
        return maps if self.bias is None else self.bias(maps)

    def standardised(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples images as `forward` does; the results are in the standardised space."""

        def encode_standardised(inputs: Tensor) -> Features:
            features = encode(inputs)
            return features._replace(spatial=self.standardise(features.spatial))

        return self.inner(images, encode_standardised)

    def forward(self, images: Tensor, encode: Encode) -> UpsampledFeatures:
        """Upsamples, in the encoder's own space; the position bias is added to `low` too."""
        low, high = self.standardised(images, encode)
        with no_autocast(images):
            low, high = (
                f._replace(spatial=self.phi_s.inverse(f.spatial.float())) for f in (low, high)
            )
        return UpsampledFeatures(low, high)

    @property
    def num_forwards(self) -> int:
        """Those of the inner upsampler."""
        return self.inner.num_forwards
