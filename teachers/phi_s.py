"""PHI-S: PCA-Hadamard isotropic standardisation of a teacher's map.

z = alpha H U^T (x - mean), with U the eigenvectors of the covariance, H an orthonormal Hadamard
matrix and alpha one scalar (Ranzinger et al., "PHI-S", arXiv 2410.01680). Every channel of z has
variance one. The transform is a rotation and one scale, so errors keep their relative size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.files import save_tensors
from teachers.hadamard import spread

_BLOCK = 4096  # rows per float64 product: bounds memory to 42 MB at 1280 channels


@dataclass
class FeatureStatistics:
    """Number, mean and scatter of feature vectors, accumulated in float64.

    The three tensors are the complete state. Merging is exact (Chan, Golub and LeVeque 1979), so
    any split over batches or ranks gives the same result up to rounding.

    Attributes:
        count: () number of vectors.
        mean: (D,).
        scatter: (D, D), the sum of outer products of the vectors minus their mean.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def zeros(cls, dim: int, *, device: torch.device | str | None = None) -> "FeatureStatistics":
        """Statistics of no vectors, for vectors of `dim` channels."""
        shapes = ((), (dim,), (dim, dim))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Adds vectors.

        Args:
            features: a map (B, D, h, w) or vectors (N, D), of any floating dtype.
            mask: boolean, (B, h, w) or (N,), which vectors to use; None for all.

        Raises:
            ValueError: other shapes, or NaN or infinity in a used vector.
        """
        rows = rearrange(features, "b d h w -> (b h w) d") if features.ndim == 4 else features
        cells = (features.shape[0], *features.shape[2:])
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(
                f"features of shape {tuple(features.shape)}: expected (B, {len(self.mean)}, h, w) "
                f"or (N, {len(self.mean)})"
            )
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != cells:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)} and {mask.dtype}: expected {cells}, bool"
                )
            rows = rows[mask.flatten()]
        for block in rows.split(_BLOCK) if len(rows) else ():
            values = block.to(self.mean)
            if not values.isfinite().all():
                raise ValueError("features hold NaN or infinity")
            mean = values.mean(0)
            centred = values - mean
            count = torch.full_like(self.count, len(values))
            self.merge(FeatureStatistics(count, mean, centred.T @ centred))

    @torch.no_grad()
    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the vectors of `other`."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        step = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(step, step) * (self.count * share)
        self.mean += step * share
        self.count.copy_(total)

    def covariance(self) -> Tensor:
        """(D, D), the scatter divided by the number of vectors minus one.

        Raises:
            RuntimeError: fewer than two vectors.
        """
        if self.count < 2:
            raise RuntimeError(f"statistics of {int(self.count)} vectors have no covariance")
        return self.scatter / (self.count - 1)


class PhiS(nn.Module):
    """Standardises maps; raises RuntimeError until fitted.

    Float32 buffers: `mean` (D,), `alpha` () and the orthogonal `rotation` (D, D), which is H U^T.

    Args:
        dim: channels D.
    """

    mean: Tensor
    alpha: Tensor
    rotation: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._fitted = False
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("alpha", torch.zeros(()))  # zero until fitted
        self.register_buffer("rotation", torch.zeros(dim, dim))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps features (B, D, h, w), float32, from the teacher's space to the standardised one.

        Every channel of the result has mean 0 and variance 1 over the fitted vectors.

        Raises:
            RuntimeError: not fitted.
        """
        self._require_fit()
        # Subtracting after the product would lose digits in channels with large means.
        return _per_cell(self.alpha * self.rotation, maps - self.mean[:, None, None])

    def inverse(self, maps: Tensor) -> Tensor:
        """Maps features from the standardised space back to the teacher's."""
        self._require_fit()
        return _per_cell(self.rotation.T / self.alpha, maps) + self.mean[:, None, None]

    @torch.no_grad()
    def fold_into_linear(self, linear: nn.Linear) -> nn.Linear:
        """A layer that computes `inverse` of the outputs of `linear`.

        Args:
            linear: its outputs are one or more vectors of D channels, one after another: u * u for
                a head that upsamples u times.

        Returns:
            A new layer with a bias, of the same dtype and device; `linear` is unchanged.

        Raises:
            RuntimeError: not fitted.
            ValueError: the number of outputs is not a multiple of D.
        """
        self._require_fit()
        mean, back = self.mean.double(), self.rotation.double().T / self.alpha.double()
        return _folded(linear, back, torch.zeros_like(mean), mean)

    @torch.no_grad()
    def standardise_linear(self, linear: nn.Linear) -> nn.Linear:
        """A layer that returns the outputs of `linear` standardised; undoes `fold_into_linear`.

        Arguments, result and errors are those of `fold_into_linear`.
        """
        self._require_fit()
        mean, forth = self.mean.double(), self.alpha.double() * self.rotation.double()
        return _folded(linear, forth, mean, torch.zeros_like(mean))

    @property
    def fitted(self) -> bool:
        """Whether it was fitted."""
        if not self._fitted:  # cached: reading a value makes the host wait for the device
            self._fitted = bool(self.alpha > 0)
        return self._fitted

    def _require_fit(self) -> None:
        if not (self.alpha.is_meta or self.fitted):  # tensors on meta have no values
            raise RuntimeError("PhiS is not fitted: use fit_phi_s or load_phi_s")


def _folded(linear: nn.Linear, matrix: Tensor, before: Tensor, after: Tensor) -> nn.Linear:
    """A layer that returns `matrix (y - before) + after` of each vector y that `linear` returns.

    The matrix is (D, D), the others (D,), all float64.
    """
    dim = len(after)
    if linear.out_features % dim:
        raise ValueError(
            f"expected a layer whose outputs are vectors of {dim} channels, got "
            f"{linear.out_features} outputs"
        )
    matrix, before, after = (each.to(linear.weight.device) for each in (matrix, before, after))
    weight = rearrange(linear.weight.double(), "(u d) i -> u d i", d=dim)
    own = torch.zeros_like(weight[..., 0])
    if linear.bias is not None:
        own = rearrange(linear.bias.double(), "(u d) -> u d", d=dim)
    folded = nn.Linear(
        linear.in_features,
        linear.out_features,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    folded.weight.copy_(rearrange(matrix @ weight, "u d i -> (u d) i"))
    folded.bias.copy_((after + (own - before) @ matrix.T).flatten())
    return folded


def _per_cell(matrix: Tensor, maps: Tensor) -> Tensor:
    """Multiplies every cell of (B, D, h, w) by a matrix (D, D)."""
    return (matrix @ maps.flatten(2)).unflatten(2, maps.shape[2:])


@torch.no_grad()
def any_phi_s(dim: int) -> PhiS:
    """The identity as a fitted PHI-S of `dim` channels."""
    phi_s = PhiS(dim)
    phi_s.alpha.fill_(1)
    phi_s.rotation.fill_diagonal_(1)
    assert phi_s.fitted  # caches the answer before the tensors may lose their values
    return phi_s


def fit_phi_s(statistics: FeatureStatistics) -> PhiS:
    """Fits PHI-S to statistics of a teacher's maps, at least 20 vectors per channel, in float64.

    The largest entry of each eigenvector (the first of equals) is positive, which fixes its sign.

    Raises:
        RuntimeError: fewer than two vectors, or zero variance.
    """
    values, vectors = torch.linalg.eigh(statistics.covariance())
    values = values.clamp(min=0)  # rounding leaves rank-deficient ones slightly negative
    variance = values.mean()
    if not variance > 0:
        raise RuntimeError("PHI-S: the features are constant and cannot be standardised")
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    phi_s = PhiS(len(values)).to(vectors.device)
    phi_s.mean.copy_(statistics.mean)
    phi_s.alpha.copy_(variance.rsqrt())
    phi_s.rotation.copy_(spread(values) @ vectors.T)
    return phi_s


def save_phi_s(path: Path, phi_s: PhiS, fingerprint: str) -> None:
    """Writes a fitted PHI-S atomically as .safetensors, with the fingerprint of its statistics."""
    phi_s._require_fit()
    save_tensors(path, phi_s.state_dict(), {"fingerprint": fingerprint})


def load_phi_s(path: Path, fingerprint: str) -> PhiS:
    """Reads a PHI-S that `save_phi_s` wrote with this fingerprint.

    Raises:
        TeacherError: the file is damaged, or has another fingerprint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("fingerprint")
            tensors = {key: file.get_tensor(key) for key in ("mean", "alpha", "rotation")}
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"{path} is not a PHI-S file: {error}") from None
    if stored != fingerprint:
        raise TeacherError(
            f"{path} was fitted to another teacher, other weights, upsampler or data: expected "
            f"fingerprint {fingerprint}, got {stored}. Delete the file to fit again"
        )
    phi_s = PhiS(len(tensors["mean"]))
    phi_s.load_state_dict(tensors)
    return phi_s
