"""Spectral reparametrization: norms of one, power iteration in training, plain weights after."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.parametrization.reparametrize import plain_weights
from distill.parametrization.spectral import SpectralScale, spectral_reparametrize


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6, bias=False))


def reparametrized() -> nn.Sequential:
    module = network()
    spectral_reparametrize(module)
    return module


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach(), 2))


def settle(module: nn.Module, passes: int = 300) -> None:
    for _ in range(passes):
        module(torch.ones(1, 12))


def parts(linear: nn.Module) -> SpectralScale:
    return linear.parametrizations["weight"][0]  # type: ignore[union-attr, index, return-value]


def test_each_weight_starts_with_a_norm_of_one_and_its_direction() -> None:
    module, plain = reparametrized(), network()
    for i in (0, 2):
        assert norm(module[i].weight) == pytest.approx(1, rel=0.03)  # after 15 steps
        direction = F.cosine_similarity(
            module[i].weight.flatten(), plain[i].weight.flatten(), 0
        ).item()
        assert direction == pytest.approx(1)
    settle(module)
    assert [norm(module[i].weight) for i in (0, 2)] == pytest.approx([1, 1], abs=1e-5)


def test_a_weight_with_one_large_singular_value_has_norm_one_at_once() -> None:
    linear = nn.Linear(5, 7)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(7, 5) + 10 * torch.ones(7, 5))
    spectral_reparametrize(linear)
    assert norm(linear.weight) == pytest.approx(1, abs=1e-6)


def test_the_norm_is_softplus_of_the_scale_plus_a_floor() -> None:
    module = reparametrized()
    settle(module)
    for scale in (-50.0, 0.0, 2.0):
        with torch.no_grad():
            parts(module[0]).scale.fill_(scale)
        assert norm(module[0].weight) == pytest.approx(math.log1p(math.exp(scale)) + 0.05, rel=1e-4)


def test_only_forward_passes_of_training_move_the_singular_vectors() -> None:
    module, x = reparametrized(), torch.ones(1, 12)
    before = copy.deepcopy(module.state_dict())
    module.eval()(x)
    with torch.no_grad():
        module.train()(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module(x)
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, before[n])}
    assert {name.rpartition(".")[2] for name in changed} == {"u", "v"}
    assert len(changed) == 4


def test_one_pass_is_one_step_of_power_iteration() -> None:
    module = reparametrized()
    weight = module[0].parametrizations.weight.original.detach()
    u = parts(module[0]).u.clone()
    module(torch.ones(1, 12))
    v = F.normalize(weight.T @ u, dim=0)
    torch.testing.assert_close(parts(module[0]).v, v)
    torch.testing.assert_close(parts(module[0]).u, F.normalize(weight @ v, dim=0))


def test_gradients_are_those_of_the_formula_with_fixed_singular_vectors() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3, bias=False).double()
    spectral_reparametrize(linear)
    linear.eval()
    weight, part = linear.parametrizations.weight.original, parts(linear)

    def effective(weight: Tensor, scale: Tensor) -> Tensor:
        return weight * (torch.log1p(scale.exp()) + 0.05) / (part.u @ weight @ part.v)

    due = torch.autograd.grad(effective(weight, part.scale).square().sum(), (weight, part.scale))
    ours = torch.autograd.grad(linear.weight.square().sum(), (weight, part.scale))
    torch.testing.assert_close(ours, due)


def test_two_forward_passes_before_a_backward_pass_are_allowed() -> None:
    module = reparametrized()
    (module(torch.ones(1, 12)) + module(torch.zeros(1, 12))).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_plain_weights_give_the_same_outputs_under_the_old_names() -> None:
    module, x = reparametrized(), torch.randn(3, 12)
    settle(module, 2)
    due = module.eval()(x)
    plain, weights = network(seed=1), plain_weights(module.state_dict())
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    assert torch.equal(plain.eval()(x), due)
    assert all(torch.equal(value, weights[name]) for name, value in plain_weights(weights).items())


def test_it_adds_one_named_scale_a_linear_and_plain_parameters() -> None:
    names = dict(reparametrized().named_parameters())
    scales = [name for name in names if name.endswith(".scale")]
    assert scales == ["0.parametrizations.weight.0.scale", "2.parametrizations.weight.0.scale"]
    assert len(names) == 3 + 2
    assert all(type(p) is nn.Parameter and p.is_leaf for p in names.values())


def test_a_state_dict_carries_it_on_to_the_bit() -> None:
    first, second = reparametrized(), network(seed=1)
    settle(first, 3)
    spectral_reparametrize(second)
    second.load_state_dict(first.state_dict())
    x = torch.ones(2, 12)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), second(x))


def test_it_is_the_same_twice_and_draws_no_number_of_the_callers() -> None:
    first = reparametrized()
    drawn = torch.rand(3)
    second = reparametrized()
    assert torch.equal(drawn, torch.rand(3))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    network()
    assert torch.equal(drawn, torch.rand(3))


def test_autocast_does_not_reach_the_power_iteration() -> None:
    first, second = reparametrized(), reparametrized()
    first(torch.ones(1, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second(torch.ones(1, 12))
    assert torch.equal(parts(first[0]).u, parts(second[0]).u)


def test_training_with_it_lowers_a_loss() -> None:
    module = reparametrized()
    x, y = torch.randn(64, 12), torch.randn(64, 6)
    optimizer = torch.optim.NAdam(module.parameters(), lr=0.003)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    settle(module)  # power iteration lags behind weights that move
    for i in (0, 2):
        due = F.softplus(parts(module[i]).scale).item() + 0.05
        assert norm(module[i].weight) == pytest.approx(due, rel=1e-4)


def test_doing_it_twice_is_refused() -> None:
    module = reparametrized()
    with pytest.raises(RuntimeError, match="reparametrized already"):
        spectral_reparametrize(module)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_it_needs_no_weights_to_be_built(keep_norm: bool) -> None:
    with torch.device("meta"):
        module = network()
    spectral_reparametrize(module, keep_norm=keep_norm)
    assert {p.device.type for p in [*module.parameters(), *module.buffers()]} == {"meta"}
    assert module.state_dict().keys() == reparametrized().state_dict().keys()
