"""Students under training-only parametrizations."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.engine.ema import AveragedModule
from distill.engine.optimizer import OptimizerConfig, decay_groups
from distill.parametrization.reparametrize import (
    ReparametrizationConfig,
    plain_weights,
    reparametrize,
)
from distill.parametrization.weight_noise import WeightNoise, add_weight_noise
from student.model import Student
from tests.test_student_model import build, tensors

ALL = ReparametrizationConfig(spectral="all", damp=0.1)


def reparametrized(config: ReparametrizationConfig, **changes: Any) -> Student:
    student = build(**changes)
    reparametrize(student, config)
    return student


def norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach(), 2))


@pytest.mark.parametrize(
    "options",
    [{"spectral": "trunk"}, {"spectral": "all"}, {"damp": 0.2}, {"damp": 0.2, "spectral": "all"}],
)
def test_at_the_start_outputs_are_those_of_the_plain_student(options: dict[str, Any]) -> None:
    student, plain = reparametrized(ReparametrizationConfig(**options)), build()
    images = torch.rand(2, 3, 8, 20)
    for one, other in zip(
        tensors(student.eval()(images)), tensors(plain.eval()(images)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_queries_keys_and_values_have_a_norm_each() -> None:
    student = reparametrized(ReparametrizationConfig(spectral="trunk"))
    qkv = student.trunk.blocks[0].attn.qkv
    (rows,) = qkv.parametrizations.weight
    with torch.no_grad():
        for _ in range(100):
            for block, part in zip(
                rows.blocks, qkv.parametrizations.weight.original.chunk(3), strict=True
            ):
                block._iterate(part, 1)
        rows.blocks[1].scale.fill_(2.0)
    before = qkv.parametrizations.weight.original.chunk(3)
    after = qkv.weight.chunk(3)
    assert norm(after[1]) == pytest.approx(float(F.softplus(torch.tensor(2.0))) + 0.05, rel=1e-4)
    for i in (0, 2):
        assert norm(after[i]) == pytest.approx(norm(before[i]), rel=0.05)


def test_a_scale_starts_as_the_norm_itself() -> None:
    student = reparametrized(ReparametrizationConfig(spectral="trunk"))
    fc1 = student.trunk.blocks[1].mlp.fc1
    scale = fc1.parametrizations.weight[0].scale
    assert float(F.softplus(scale.detach()) + 0.05) == pytest.approx(
        norm(fc1.parametrizations.weight.original), rel=0.05
    )


def test_spectral_leaves_the_patch_projection_and_the_heads_unless_told() -> None:
    student = reparametrized(ReparametrizationConfig(spectral="trunk"))
    scales = {n for n, _ in student.named_parameters() if n.endswith("scale")}
    assert len(scales) == 2 * (3 + 3)  # three of qkv, one each of proj, fc1 and fc2
    assert all(name.startswith("trunk.blocks.") for name in scales)
    more = {n for n, _ in reparametrized(ALL).named_parameters() if n.endswith("scale")}
    assert {n.partition(".")[0] for n in more - scales} == {"heads"}


def test_scales_are_decayed_with_the_matrices() -> None:
    student = reparametrized(ALL)
    decayed, free = decay_groups(student, OptimizerConfig(), student.no_weight_decay())
    scales = {p for n, p in student.named_parameters() if n.endswith("scale")}
    assert scales
    assert scales <= set(decayed.parameters)
    assert not scales & set(free.parameters)


@pytest.mark.parametrize("config", [ALL, ReparametrizationConfig(damp=0.1)])
def test_plain_weights_are_a_plain_students_with_the_same_outputs(
    config: ReparametrizationConfig,
) -> None:
    student, images = reparametrized(config), torch.rand(2, 3, 8, 20)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for _ in range(3):
        sum(t.square().mean() for t in tensors(student(images))).backward()  # type: ignore[union-attr]
        optimizer.step()
    weights, plain = plain_weights(student.state_dict()), build()
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    for one, other in zip(
        tensors(student.eval()(images)), tensors(plain.eval()(images)), strict=True
    ):
        assert torch.equal(one, other)


def test_an_average_reduces_to_a_plain_student_too() -> None:
    student = reparametrized(ALL)
    average = AveragedModule(student, 0.9)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01
    average.follow(student)
    weights, plain = plain_weights(average.weights()), build().eval()
    plain.load_state_dict(weights)
    images = torch.rand(2, 3, 8, 20)
    for one, other in zip(tensors(average.module(images)), tensors(plain(images)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_noise_has_mean_one_its_deviation_and_is_drawn_anew() -> None:
    linear = nn.Linear(40, 30, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    add_weight_noise(linear, 0.3)
    torch.manual_seed(0)
    drawn = torch.stack([linear.weight.detach() for _ in range(200)]) / 2
    sigma = 0.3 / drawn.numel() ** 0.5
    assert abs(float(drawn.mean()) - 1) < 4 * sigma
    assert float(drawn.std()) == pytest.approx(0.3, rel=0.01)
    assert not torch.equal(drawn[0], drawn[1])
    assert float((drawn[0] - 1).flatten() @ (drawn[1] - 1).flatten()) / 1200 < 4 * 0.09 / 1200**0.5


def test_noise_is_the_identity_in_evaluation_and_without_gradients() -> None:
    weight = torch.randn(4, 3)
    noise = WeightNoise(0.3)
    assert not torch.equal(noise(weight), weight)
    with torch.no_grad():
        assert torch.equal(noise(weight), weight)
    assert torch.equal(noise.eval()(weight), weight)


def test_the_gradient_of_a_noisy_weight_is_that_of_the_product() -> None:
    linear = nn.Linear(3, 2, bias=False)
    add_weight_noise(linear, 0.5)
    x = torch.randn(5, 3)
    torch.manual_seed(0)
    linear(x).sum().backward()
    torch.manual_seed(0)
    factor = 1 + 0.5 * torch.randn(2, 3)
    due = factor * x.sum(0)
    torch.testing.assert_close(linear.parametrizations.weight.original.grad, due)
