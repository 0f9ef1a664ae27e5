"""Orthogonal matrices that spread the variance of a diagonal covariance evenly.

Hadamard matrices by construction (Sylvester; Paley 1933, I and II; Kronecker products of them);
for sizes that these do not reach, a product of Givens rotations. Float64 throughout.
"""

import math

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix (n, n), if these constructions reach its size.

    The largest power of two is split off first (Sylvester); the rest is Paley I or II.

    Returns:
        float64 with entries +1 and -1 and H @ H.T = n I; None for other sizes.
    """
    power = n & -n
    while power:
        core = _core(n // power)
        if core is not None:
            return torch.kron(_sylvester(power), core)
        power //= 2
    return None


def _core(n: int) -> Tensor | None:
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return _paley_1(n) if n % 4 == 0 and _is_prime(n - 1) else _paley_2(n)


def _sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(block, matrix)
    return matrix


def _paley_1(n: int) -> Tensor:
    """Size q + 1 for a prime q = 3 mod 4: I + S with a skew-symmetric S."""
    s = _bordered(n - 1)
    s[1:, 0] = -1
    return s + torch.eye(n, dtype=torch.float64)


def _paley_2(n: int) -> Tensor | None:
    """Size 2 (q + 1) for a prime q = 1 mod 4."""
    q = n // 2 - 1
    if n % 2 or q % 4 != 1 or not _is_prime(q):
        return None
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    identity = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(_bordered(q), block) + torch.kron(identity, diagonal)


def _bordered(q: int) -> Tensor:
    """(q + 1, q + 1): the Jacobsthal matrix of a prime q, with a border of ones and a zero."""
    legendre = torch.full((q,), -1.0, dtype=torch.float64)
    numbers = torch.arange(q)
    legendre[numbers**2 % q] = 1
    legendre[0] = 0
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = legendre[(numbers[:, None] - numbers) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def spread(variances: Tensor) -> Tensor:
    """An orthogonal Q, (n, n), such that Q diag(variances) Q.T has a constant diagonal; float64.

    It is the normalised Hadamard matrix, with entries +-n^-1/2, which works for all variances; for
    a size without one, Givens rotations for these.
    """
    n = len(variances)
    matrix = hadamard(n)
    return _givens(variances) if matrix is None else (matrix / math.sqrt(n)).to(variances.device)


def _givens(variances: Tensor) -> Tensor:
    """Rotates the smallest against the largest diagonal entry until all equal the mean.

    Each rotation makes one entry equal to the mean, so n - 1 rotations are enough.
    """
    n, mean = len(variances), variances.mean()
    covariance, rotation = torch.diag(variances), torch.eye(n).to(variances)
    todo = torch.ones(n, dtype=torch.bool, device=variances.device)
    for _ in range(n - 1):
        diagonal = covariance.diagonal()
        i = int(torch.where(todo, diagonal, math.inf).argmin())
        j = int(torch.where(todo, diagonal, -math.inf).argmax())
        low, high, cross = diagonal[i] - mean, diagonal[j] - mean, covariance[i, j]
        if not (low < 0 < high):
            break
        # tan t solves low + 2 t cross + t^2 high = 0, so that entry i becomes the mean.
        t = (-cross + torch.sqrt(cross**2 - low * high)) / high
        cos = 1 / torch.sqrt(1 + t**2)
        turn = torch.stack([torch.stack([cos, cos * t]), torch.stack([-cos * t, cos])])
        pair = [i, j]
        covariance[pair] = turn @ covariance[pair]
        covariance[:, pair] = covariance[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
        todo[i] = False
    return rotation
