"""DAMP: multiplicative noise on the weights in training makes a model robust to corrupted inputs.

Trinh et al., "Improving robustness to corruptions with multiplicative weight perturbations"
(arXiv 2406.16540): W becomes W * xi, where xi is drawn from N(1, sigma^2) anew in every forward
pass and on every rank. C-RADIOv4 (arXiv 2601.17237) trains with it; its sigma is not published.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class WeightNoise(nn.Module):
    """The parametrization of one weight: noise in training, else the identity.

    Args:
        std: sigma.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with noise, of the same shape; draws from torch's default generator."""
        if not (self.training and torch.is_grad_enabled()):
            return weight
        return weight * (1 + self.std * torch.randn_like(weight))


def add_weight_noise(module: nn.Module, std: float) -> None:
    """Adds noise to the weight of every Linear in `module`, after other parametrizations."""
    for linear in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(linear, "weight", WeightNoise(std), unsafe=True)
