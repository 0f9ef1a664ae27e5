"""One more teacher for a trained student: what moves, and what stays to the bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.engine.optimizer import OptimizerConfig, build_optimizer, decay_groups
from distill.parametrization.finetuning import FinetuningConfig, freeze
from distill.parametrization.lora import LoRA
from distill.parametrization.reparametrize import plain_weights
from distill.runtime.distributed import seed_default_generators
from distill.runtime.errors import RecipeError
from student import initial
from student.config import StudentConfig, StudentInit
from student.model import Student
from student.storage import save_student
from teachers.features import FeatureSpec
from tests.test_student_model import SMALL, SPECS, TARGETS, tensors
from tests.test_tasks_student_task import TIMM, _recipe

NEW = FeatureSpec(summary_dim=4, spatial_dim=5, **SPECS)
FROZEN = FinetuningConfig(trunk="frozen")
LOW_RANK = FinetuningConfig(trunk="low_rank", rank=2)


def build(targets: Mapping[str, FeatureSpec] = TARGETS, **changes: object) -> Student:
    """A small student with its initial weights; its norm gives random tokens a trained scale."""
    torch.manual_seed(0)
    return initial.build(StudentConfig(**(SMALL | {"final_norm": True} | changes)), targets)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Student, StudentInit]:
    student = build()
    path = tmp_path / "student.safetensors"
    save_student(path, student.config, student.targets, student.state_dict(), {})
    return student.eval(), StudentInit(kind="student", path=path)


def learn(
    init: StudentInit, config: FinetuningConfig, steps: int = 30
) -> tuple[Student, list[float]]:
    """Trains a head for `new` on fixed targets, with weight decay."""
    student = build({**TARGETS, "new": NEW}, init=init, isolated=("new",))
    freeze(student, init, config, ["new"])
    seed_default_generators(0)
    settings = OptimizerConfig(lr=0.02, weight_decay=0.1)
    groups = decay_groups(student, settings, student.no_weight_decay())
    optimizer = build_optimizer(settings, groups)
    images, summary, spatial = torch.rand(4, 3, 8, 20), torch.randn(4, 4), torch.randn(4, 5, 2, 5)
    losses = []
    for _ in range(steps):
        head = student.train()(images).heads["new"]
        loss = (head.summary - summary).square().mean() + (head.spatial - spatial).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return student.eval(), losses


def test_with_a_frozen_trunk_every_old_output_stays_and_the_new_head_learns(
    trained: tuple[Student, StudentInit],
) -> None:
    before, init = trained
    student, losses = learn(init, FROZEN)
    assert losses[-1] < 0.8 * losses[0]
    images = torch.rand(3, 3, 12, 8)
    old, new = before(images), student(images)
    for name in TARGETS:
        for one, other in zip(old.heads[name], new.heads[name], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(old.backbone.spatial, new.backbone.spatial, atol=1e-6, rtol=1e-5)
    for name, value in before.state_dict().items():
        now = student.state_dict()[name]
        if name == "trunk.embedding.class_tokens":
            assert torch.equal(now[:3], value)
        else:
            assert torch.equal(now, value), name


def test_the_new_class_token_is_trained(trained: tuple[Student, StudentInit]) -> None:
    init = trained[1]
    fresh = build({**TARGETS, "new": NEW}, init=init, isolated=("new",))
    student, _ = learn(init, FROZEN)
    name = "trunk.embedding.class_tokens"
    assert not torch.equal(student.get_parameter(name)[3], fresh.get_parameter(name)[3])


def test_low_rank_updates_start_at_nothing_and_keep_their_rank(
    trained: tuple[Student, StudentInit],
) -> None:
    before, init = trained
    student, losses = learn(init, LOW_RANK, 0)
    images = torch.rand(2, 3, 8, 20)
    for one, other in zip(tensors(before(images))[1:3], tensors(student(images))[1:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    student, losses = learn(init, LOW_RANK)
    assert losses[-1] < 0.8 * losses[0]
    weights, plain = plain_weights(student.state_dict()), before.state_dict()
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        name = f"trunk.blocks.0.{layer}.weight"
        values = torch.linalg.svdvals(weights[name] - plain[name])
        assert values[1] > 1e-6
        assert values[2:].max() < 1e-5 * values[0]
    assert torch.equal(weights["trunk.embedding.positions"], plain["trunk.embedding.positions"])
    assert torch.equal(
        weights["heads.sam.spatial.fc1.weight"], plain["heads.sam.spatial.fc1.weight"]
    )


def test_merged_low_rank_updates_give_the_same_outputs(
    trained: tuple[Student, StudentInit],
) -> None:
    student, _ = learn(trained[1], LOW_RANK)
    plain = build({**TARGETS, "new": NEW}, isolated=("new",)).eval()
    plain.load_state_dict(plain_weights(student.state_dict()))
    images = torch.rand(2, 3, 8, 20)
    for one, other in zip(tensors(student(images)), tensors(plain(images)), strict=True):
        assert torch.equal(one, other)


def test_an_update_is_the_product_of_its_factors() -> None:
    weight = torch.randn(4, 3)
    update = LoRA(weight, 2)
    assert torch.equal(update(weight), weight)
    torch.nn.init.normal_(update.up)
    expected: Tensor = weight.double() + update.up.double() @ update.down.double()
    torch.testing.assert_close(update(weight).double(), expected, atol=1e-5, rtol=1e-5)


def test_heads_of_teachers_that_are_run_along_are_trained(
    trained: tuple[Student, StudentInit],
) -> None:
    student = build(init=trained[1])
    freeze(student, trained[1], FROZEN, ["clip"])
    moving = {n.rpartition(".")[0] for n, p in student.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in moving} == {"clip"}


def test_a_new_class_token_that_a_frozen_trunk_would_read_is_refused(
    trained: tuple[Student, StudentInit],
) -> None:
    student = build({**TARGETS, "new": NEW}, init=trained[1])
    with pytest.raises(RecipeError, match="student.isolated: must name new, new to .*student.safe"):
        freeze(student, trained[1], FROZEN, ["new"])
    freeze(student, trained[1], LOW_RANK, ["new"])


FILE = {"kind": "student", "path": "nowhere"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "finetuning: needs a trained student; give its file as student.init"),
        ({"student": {"init": FILE}, "engine": {"zero_stage": 3}}, "engine.zero_stage: 3 splits"),
        (
            {"student": {"init": FILE}, "reparametrisation": {"spectral": "trunk"}},
            "reparametrisation.spectral: trains the norms of layers that finetuning freezes",
        ),
    ],
)
def test_what_finetuning_cannot_do_is_refused(sections: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _recipe(TIMM, **{"student": {}, **sections, "finetuning": {"trunk": "frozen"}})


def test_reparametrisation_under_activation_checkpointing_is_refused() -> None:
    student = {"size": "tiny", "max_resolution": 32, "activation_checkpointing": True}
    for options in ({"damp": 0.1}, {"spectral": "trunk"}):
        with pytest.raises(ValidationError, match="student.activation_checkpointing to false"):
            _recipe(TIMM, student=student, reparametrisation=options)


def test_a_frozen_trunk_keeps_every_class_token_that_its_tokens_read(
    trained: tuple[Student, StudentInit],
) -> None:
    init = trained[1]
    first = next(iter(TARGETS))
    fewer = {name: spec for name, spec in TARGETS.items() if name != first}
    student = build({**fewer, "new": NEW}, init=init, isolated=("new",))
    with pytest.raises(RecipeError, match=f"teachers: .* has a class token of {first}, which"):
        freeze(student, init, FROZEN, ["new"])


def test_a_frozen_trunk_isolates_the_old_teachers_that_the_file_does_and_no_others(
    trained: tuple[Student, StudentInit], tmp_path: Path
) -> None:
    first = next(iter(TARGETS))
    student = build({**TARGETS, "new": NEW}, init=trained[1], isolated=("new", first))
    with pytest.raises(RecipeError, match=r"student\.isolated: of the teachers in .* name none"):
        freeze(student, trained[1], FROZEN, ["new"])
    second, _ = learn(trained[1], FROZEN, steps=1)
    path = tmp_path / "second.safetensors"
    save_student(path, second.config, second.targets, second.state_dict(), {})
    init = StudentInit(kind="student", path=path)
    third = build({**TARGETS, "new": NEW, "newer": NEW}, init=init, isolated=("newer",))
    with pytest.raises(RecipeError, match=r"student\.isolated: of the teachers in .* name new"):
        freeze(third, init, FROZEN, ["newer"])
    freeze(build({**TARGETS, "new": NEW}, init=init, isolated=("new",)), init, FROZEN, ["new"])
