"""The plan of a student that is a network of timm: its FLOPs, its memory, its teachers' routes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from distill.planning.meter import FakeWeights, Meter
from distill.planning.run import workload_of
from distill.planning.student_step import StudentWorkload
from student.model import Student
from student.timm_config import TimmStudentConfig
from tests.test_planning_meter import HEAD, SPEC, _largest_sum, loss_of
from tests.tiny_run import tiny_recipe


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_costs_as_much_for_each_gradient_as_forward(groups: int) -> None:
    """Torch's own formula counts the gradient of the weight of all groups for each of them."""
    fake = FakeWeights()
    layer = fake.fill(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups))
    images = fake.tensor(2, 8, 6, 10).requires_grad_()
    with Meter(layer) as meter:
        meter.switch_to("layer")
        layer(images).sum().backward()
    forward = 2 * (2 * 16 * 3 * 5) * (8 // groups * 3 * 3)
    assert meter.components["layer"].flops == {torch.float32: 3 * forward}


@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
def test_a_pass_of_the_trunk_counts_for_the_student_and_the_rest_for_the_heads(model: str) -> None:
    config, fake = TimmStudentConfig(model=model, head=HEAD), FakeWeights()
    with torch.device("meta"):
        student = fake.fill(Student(config, {"expert": SPEC})).train()
    images = fake.tensor(2, 3, 64, 96)
    with Meter(student) as meter:
        meter.watch(student.trunk, "student")
        meter.watch(student.heads["expert"], "heads")
        loss = loss_of(student, images)
        meter.switch_to("heads")
        loss.backward()
    with FlopCounterMode(display=False) as counter:
        student.trunk(images)
    once = counter.get_total_flops()
    # Nobody asks for the gradient of the pixels, which the stem would compute.
    assert 2.4 * once < meter.components["student"].flops[torch.float32] < 3 * once
    width = student.spec.spatial_dim
    rows = 2 * (2 * 3 * (width * 20 + 20 * 24 * 2**2) + width * 20 + 20 * 12)
    rows += 2 * (2 * 3 + 1) * 2 * 20 * 20
    assert meter.components["heads"].flops == {torch.float32: 3 * 2 * rows}


@pytest.mark.long
@pytest.mark.parametrize("model", ["test_convnext", "test_resnet"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_a_real_step_allocates(model: str, checkpointing: bool) -> None:
    config = TimmStudentConfig(model=model, head=HEAD, activation_checkpointing=checkpointing)
    shape = (8, 3, 256, 192)
    student = Student(config, {"expert": SPEC}).train()
    images = torch.rand(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss_of(student, images).backward()
    fake = FakeWeights()
    with torch.device("meta"):
        faked = fake.fill(Student(config, {"expert": SPEC})).train()
    with Meter(faked) as meter:
        loss_of(faked, fake.tensor(*shape)).backward()
    assert meter.peak_with_gradients == pytest.approx(_largest_sum(profiler), rel=0.1)


def test_a_recipe_has_a_plan_with_mesa_and_with_checkpointing(tmp_path: Path) -> None:
    tree = tiny_recipe(
        tmp_path,
        run={"resolution": 64},
        student={"kind": "timm", "model": "test_resnet"},
        objective={"mesa": {"start_step": 2}},
    )
    for key in ("width", "depth", "heads", "max_resolution"):
        del tree["student"][key]
    workload = workload_of(tree, "test")
    assert isinstance(workload, StudentWorkload)
    (arm,) = workload.arms
    trace, rows = workload.trace(arm, 2), workload.rows(arm)
    assert {row.component for row in rows} == trace.components.keys()
    assert all(trace.components[row.component].flops.total() > 0 for row in rows)
    shapes = {row.component: row.shapes for row in rows}
    assert shapes["student"] == "64x64 px -> 2x2x96"
    assert shapes["expert"] == "64x64 px -> 4x4x64"
    workload.switch_checkpointing()
    assert workload.checkpointing
    again = workload.trace(arm, 2)
    assert again.flops("student").total() > trace.flops("student").total()
