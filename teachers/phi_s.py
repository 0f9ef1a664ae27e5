"""PHI-S: PCA-Hadamard isotropic standardisation of a teacher's map (arXiv 2410.01680).

z = alpha H U^T (x - mean), with U the eigenvectors of the covariance, H an orthonormal Hadamard
matrix and alpha one scalar. Every channel of z then has variance one, and because the map is a
rotation and one scale, errors keep their relative size.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.files import atomic
from teachers.hadamard import spread

_BLOCK = 4096  # rows a float64 product sees at once: bounds memory, 42 MB at 1280 channels


@dataclass
class FeatureStatistics:
    """Number, mean and scatter of feature vectors, accumulated in float64.

    The three tensors are the whole state: sum, gather or save them as they are. Merging is exact
    (Chan, Golub and LeVeque 1979), so that any split over batches or ranks gives the same result.

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
        """Statistics of nothing yet, for vectors of `dim` channels."""
        shapes = ((), (dim,), (dim, dim))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    @torch.no_grad()
    def update(self, features: Tensor, mask: Tensor | None = None) -> None:
        """Adds vectors.

        Args:
            features: (B, D, h, w) a map, or (N, D) vectors, of any floating dtype.
            mask: which of them count, boolean, (B, h, w) or (N,); None for all.

        Raises:
            ValueError: other shapes, or a vector that counts is NaN or infinite.
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
        """Adds what `other` has seen, as if its vectors had been given here."""
        total = self.count + other.count
        share = other.count / total.clamp(min=1)
        step = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(step, step) * (self.count * share)
        self.mean += step * share
        self.count.copy_(total)

    def covariance(self) -> Tensor:
        """(D, D), divided by the number of vectors less one.

        Raises:
            RuntimeError: fewer than two vectors were seen.
        """
        if self.count < 2:
            raise RuntimeError(f"statistics of {int(self.count)} vectors have no covariance")
        return self.scatter / (self.count - 1)


class PhiS(nn.Module):
    """Standardises maps; the identity of nothing until it is fitted.

    Buffers, all float32: `mean` (D,), `alpha` () and `rotation` (D, D), with rotation orthogonal.

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
        """From the teacher's space to the standardised one.

        Args:
            maps: (B, D, h, w), float32.

        Returns:
            The same shape; mean 0 and variance 1 in every channel, over the fitted vectors.

        Raises:
            RuntimeError: not fitted.
        """
        self._require_fit()
        # The mean goes first: outlier channels would cost digits after the product.
        return _per_cell(self.alpha * self.rotation, maps - self.mean[:, None, None])

    def inverse(self, maps: Tensor) -> Tensor:
        """From the standardised space back to the teacher's; the shapes of `forward`."""
        self._require_fit()
        return _per_cell(self.rotation.T / self.alpha, maps) + self.mean[:, None, None]

    @torch.no_grad()
    def fold_into_linear(self, linear: nn.Linear) -> nn.Linear:
        """A layer that outputs the teacher's own space where `linear` outputs the standardised.

        Args:
            linear: its outputs are one or several vectors of D channels, one after another: u * u
                for a head that upsamples u times.

        Returns:
            A new layer with a bias, of the same dtype and device; `linear` stays as it is.

        Raises:
            RuntimeError: not fitted.
            ValueError: the outputs are no multiple of D.
        """
        self._require_fit()
        dim = len(self.mean)
        if linear.out_features % dim:
            raise ValueError(
                f"a layer of {linear.out_features} outputs holds no whole vectors of {dim} channels"
            )
        back = (self.rotation.double().T / self.alpha.double()).to(linear.weight.device)
        weight = rearrange(linear.weight.double(), "(u d) i -> u d i", d=dim)
        mean = repeat(self.mean.double(), "d -> u d", u=len(weight)).to(weight.device)
        if linear.bias is not None:
            mean = mean + rearrange(linear.bias.double(), "(u d) -> u d", d=dim) @ back.T
        folded = nn.Linear(
            linear.in_features,
            linear.out_features,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        folded.weight.copy_(rearrange(back @ weight, "u d i -> (u d) i"))
        folded.bias.copy_(mean.flatten())
        return folded

    @property
    def fitted(self) -> bool:
        """Whether statistics were given."""
        if not self._fitted:  # looked up once: reading a value makes the host wait for the device
            self._fitted = bool(self.alpha > 0)
        return self._fitted

    def _require_fit(self) -> None:
        if not (self.alpha.is_meta or self.fitted):  # on meta there are no values to look at
            raise RuntimeError("PhiS is not fitted: fit_phi_s or load_phi_s gives one that is")


def _per_cell(matrix: Tensor, maps: Tensor) -> Tensor:
    """One matrix product per cell of (B, D, h, w), without moving the channels."""
    return (matrix @ maps.flatten(2)).unflatten(2, maps.shape[2:])


@torch.no_grad()
def any_phi_s(dim: int) -> PhiS:
    """One that changes nothing, for what depends on sizes only: timing, and plans.

    Args:
        dim: channels D.
    """
    phi_s = PhiS(dim)
    phi_s.alpha.fill_(1)
    phi_s.rotation.fill_diagonal_(1)
    assert phi_s.fitted  # which is looked up once: tensors without data have no values
    return phi_s


def fit_phi_s(statistics: FeatureStatistics) -> PhiS:
    """Fits PHI-S to statistics, in float64.

    Each eigenvector's sign is set so that its largest entry (the first of equal ones) is positive:
    the same statistics give the same rotation.

    Args:
        statistics: of the teacher's maps; some twenty vectors a channel, better many more.

    Raises:
        RuntimeError: fewer than two vectors, or no variance at all.
    """
    values, vectors = torch.linalg.eigh(statistics.covariance())
    values = values.clamp(min=0)  # rounding leaves rank-deficient ones slightly negative
    variance = values.mean()
    if not variance > 0:
        raise RuntimeError("PHI-S: the features are constant; there is nothing to standardise")
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    phi_s = PhiS(len(values)).to(vectors.device)
    phi_s.mean.copy_(statistics.mean)
    phi_s.alpha.copy_(variance.rsqrt())
    phi_s.rotation.copy_(spread(values) @ vectors.T)
    return phi_s


def save_phi_s(path: Path, phi_s: PhiS, fingerprint: str) -> None:
    """Writes a fitted PHI-S, whole or not at all.

    Args:
        path: a .safetensors file; its folder exists.
        phi_s: fitted.
        fingerprint: of everything that the statistics depend on, see `teacher_fingerprint`.
    """
    phi_s._require_fit()
    tensors = {name: value.contiguous() for name, value in phi_s.state_dict().items()}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata={"fingerprint": fingerprint})


def load_phi_s(path: Path, fingerprint: str) -> PhiS:
    """Reads a PHI-S that `save_phi_s` wrote.

    Args:
        path: the file.
        fingerprint: what it must have been fitted to.

    Raises:
        TeacherError: the file is damaged, or was fitted to something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get("fingerprint")
            tensors = {key: file.get_tensor(key) for key in ("mean", "alpha", "rotation")}
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"{path} holds no PHI-S: {error}") from None
    if stored != fingerprint:
        raise TeacherError(
            f"{path} was fitted to another teacher, other weights, upsampler or data: it carries "
            f"fingerprint {stored}, due is {fingerprint}. Delete it to fit anew"
        )
    phi_s = PhiS(len(tensors["mean"]))
    phi_s.load_state_dict(tensors)
    return phi_s
