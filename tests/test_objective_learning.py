"""A small student learns 32 images of two random teachers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.objective.objective import Objective
from distill.objective.objective_config import ObjectiveConfig
from distill.objective.views import ShiftConfig, build_views, frame_size
from distill.objective.weighting import BalancingConfig
from distill.parametrization.reparametrize import ReparametrizationConfig, reparametrize
from distill.runtime import distributed
from student.config import HeadConfig, StudentConfig
from student.model import Student
from teachers.features import Features
from tests.doubles import SPEC, Curved

TEACHERS = {"one": Curved(), "other": Curved()}
torch.nn.init.normal_(
    TEACHERS["other"].net.weight, std=0.3, generator=torch.Generator().manual_seed(1)
)


def standardised(images: Tensor) -> dict[str, Features]:
    """Maps of mean 0 and variance 1 in every channel, so that the mean costs 1."""
    found = {}
    for name, teacher in TEACHERS.items():
        summary, spatial = teacher(images)
        centred = spatial - spatial.mean((0, 2, 3), keepdim=True)
        found[name] = Features(summary, centred / centred.std((0, 2, 3), keepdim=True))
    return found


EVERYTHING = {
    "summary": "angle",
    "equivariance": ShiftConfig(kind="shift", limit=1),
    "dropping": 0.5,
    "balancing": BalancingConfig(decay=0.9),
}
TRAINED = ReparametrizationConfig(spectral="all", damp=0.01)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "reparametrisation", "attention"),
    [({}, ReparametrizationConfig(), 0), (EVERYTHING, TRAINED, 1)],
)
def test_the_loss_falls_tenfold_and_every_map_is_known_better_than_its_mean(
    options: dict[str, Any], reparametrisation: ReparametrizationConfig, attention: int
) -> None:
    torch.manual_seed(0)
    config = ObjectiveConfig(**options)
    images = torch.rand(32, 3, *frame_size(config.equivariance, (12, 20), 4))
    head = HeadConfig(hidden_dim=64, num_layers=1, attention_blocks=attention, attention_heads=4)
    sizes = {"width": 64, "heads": 4, "depth": 2, "patch_size": 4, "max_resolution": 24}
    # Random blocks leave small tokens, and 120 steps are few to make them larger.
    architecture = StudentConfig(**sizes, head=head, final_norm=True)
    student = Student(architecture, dict.fromkeys(TEACHERS, SPEC))
    reparametrize(student, reparametrisation)
    objective = Objective(config, dict.fromkeys(TEACHERS, torch.tensor(1.0)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses: list[dict[str, float]] = []
    for step in range(120):
        distributed.seed_default_generators(0, step)
        generator = distributed.derived_generator("views")
        views = build_views(config.equivariance, images, 4, list(TEACHERS), generator)
        targets = {name: standardised(views.of(name))[name] for name in TEACHERS}
        shares = dict.fromkeys(TEACHERS, 1.0)
        terms = objective(student(views.student).heads, targets, shares, views.pairs)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        objective.finish_step()
        losses.append({name: float(value) for name, value in terms.losses.items()})
    first, last = losses[0], losses[-1]
    for name in TEACHERS:
        assert last[f"{name}/spatial"] < min(first[f"{name}/spatial"], 1) / 10
    # Summaries of displaced crops of noise have little to be learned by heart.
    assert sum(last.values()) < sum(first.values()) / (5 if config.equivariance else 10)
