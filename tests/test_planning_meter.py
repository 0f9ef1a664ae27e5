"""The meter against formulas of ViTs, and against what a real backward pass allocates."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from distill.engine.engine import Autocast
from distill.planning.meter import FakeWeights, Meter
from student.config import HeadConfig, StudentConfig
from student.model import Student
from teachers.features import FeatureSpec

SPEC = FeatureSpec(summary_dim=12, spatial_dim=24, patch_size=16, resolution=(64, 96))
BATCH, GRID = 3, (4, 6)
HEAD = HeadConfig(hidden_dim=20, num_layers=2)


def faked(**options: Any) -> tuple[Student, FakeWeights]:
    config = StudentConfig(width=32, depth=2, heads=2, max_resolution=128, head=HEAD, **options)
    fake = FakeWeights()
    with torch.device("meta"):
        student = Student(config, {"expert": SPEC})
    return fake.fill(student).train(), fake


def loss_of(student: nn.Module, images: Tensor) -> Tensor:
    head = student(images).heads["expert"]
    return head.spatial.square().mean() + head.summary.square().mean()


def metered(student: Student, fake: FakeWeights, precision: str = "fp32") -> Meter:
    images = fake.tensor(BATCH, 3, 16 * GRID[0], 16 * GRID[1])
    with Meter(student) as meter:
        meter.watch(student.trunk, "student")
        meter.watch(student.heads["expert"], "heads")
        loss = loss_of(Autocast(student, precision), images)
        meter.switch_to("heads")
        loss.backward()
    return meter


def test_flops_of_trunk_and_heads_are_those_of_their_matrices() -> None:
    parts = metered(*faked()).components
    cells = GRID[0] * GRID[1]
    tokens, width, mlp = cells + 1 + 4, 32, 128
    patches = 2 * BATCH * cells * 3 * 16**2 * width
    block = 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width
    # Forward once and backward twice; nobody asks for the gradient of the pixels.
    assert parts["student"].flops == {torch.float32: 2 * patches + 3 * BATCH * 2 * block}
    inner = width * 20 + 2 * 20 * 20
    rows = BATCH * (cells * (inner + 20 * 24) + inner + 20 * 12)
    assert parts["heads"].flops == {torch.float32: 3 * 2 * rows}


def test_under_autocast_the_trunk_counts_as_bf16_and_the_heads_as_float32() -> None:
    plain, mixed = (metered(*faked(), precision=p).components for p in ("fp32", "bf16"))
    assert mixed["heads"].flops == plain["heads"].flops
    assert mixed["student"].flops == {torch.bfloat16: plain["student"].flops[torch.float32]}


def test_checkpointing_computes_all_but_each_blocks_last_product_again() -> None:
    plain, again = (metered(*faked(activation_checkpointing=c)).components for c in (False, True))
    tokens, width, mlp = GRID[0] * GRID[1] + 5, 32, 128
    block = 2 * tokens * (4 * width**2 + width * mlp) + 4 * tokens**2 * width
    more = again["student"].flops[torch.float32] - plain["student"].flops[torch.float32]
    assert more == BATCH * 2 * block


def test_gradients_end_as_large_as_the_weights_and_all_else_is_gone() -> None:
    student, fake = faked()
    meter = metered(student, fake)
    assert meter.gradients == sum(4 * p.numel() for p in student.parameters())
    assert meter.live < meter.peak / 20


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_a_real_step_allocates(precision: str, checkpointing: bool) -> None:
    config = StudentConfig(
        size="tiny",
        depth=4,
        max_resolution=256,
        head=HEAD,
        activation_checkpointing=checkpointing,
    )
    shape = (8, 3, 256, 192)
    student = Student(config, {"expert": SPEC}).train()
    images = torch.rand(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(Autocast(student, precision), images).backward()
    measured = _largest_sum(profiler)

    fake = FakeWeights()
    with torch.device("meta"):
        faked = Student(config, {"expert": SPEC})
    fake.fill(faked).train()
    pixels = fake.tensor(*shape)
    with Meter(faked) as meter:
        loss_of(Autocast(faked, precision), pixels).backward()
    assert meter.peak_with_gradients == pytest.approx(measured, rel=0.1)


def _largest_sum(profiler: Any) -> int:
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
