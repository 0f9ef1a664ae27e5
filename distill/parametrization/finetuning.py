"""Adds a teacher to a trained student and keeps what the student has learned from the others.

Trained are the heads of the teachers that are run, the class tokens that the initial student lacks
and, with `low_rank`, LoRA updates of the trunk's linear layers. Everything else is frozen and not
decayed. With a frozen trunk and the new teachers named in `student.isolated`, every old output
stays the same. With LoRA the old outputs move; running the old teachers too keeps them in place.

A network of timm has no class tokens and no LoRA: its trunk is frozen, and so are the running
statistics of its batch norms.
"""

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from distill.parametrization.lora import add_lora
from distill.runtime.errors import RecipeError
from student.config import StudentConfig, StudentInit
from student.model import Student
from student.storage import StudentHeader, read_header
from student.timm_trunk import TimmTrunk
from teachers.config import StrictConfig


class FinetuningConfig(StrictConfig):
    """What is trained in the trunk.

    Attributes:
        trunk: `frozen`: nothing; `low_rank`: LoRA on every linear layer of the blocks.
        rank: of the LoRA updates.
    """

    trunk: Literal["frozen", "low_rank"]
    rank: PositiveInt = 16


def freeze(
    student: Student, init: StudentInit, config: FinetuningConfig, running: Collection[str]
) -> None:
    """Freezes a student in place, except for what is to be trained.

    Args:
        student: with the initial weights.
        init: where they come from.
        config: what is trained in the trunk.
        running: names of the teachers that are run.

    Raises:
        RecipeError: the trunk is frozen, and its tokens would attend to other class tokens than
            before.
    """
    source = read_header(init.path)
    trunk = student.trunk.requires_grad_(False)
    for name, head in student.heads.items():
        head.requires_grad_(name in running)
    if isinstance(trunk, TimmTrunk):
        assert config.trunk == "frozen"  # a recipe refuses low_rank
        trunk.frozen = True
        trunk.train(student.training)
        return
    if config.trunk == "frozen":
        _check_tokens(student, source, init)
    old = set(source.targets)
    tokens = trunk.embedding.class_tokens
    fresh = torch.tensor([[name not in old] for name in student.targets])
    if fresh.any():
        tokens.requires_grad_(True)
        tokens.register_hook(lambda gradient: _only(gradient, fresh))
    if config.trunk == "low_rank":
        add_lora(trunk.blocks, config.rank)


def _check_tokens(student: Student, source: StudentHeader, init: StudentInit) -> None:
    """Refuses a student whose tokens attend to other class tokens than those of the file do.

    Class tokens named in `student.isolated` are read by no other token.
    """
    assert isinstance(student.config, StudentConfig)
    assert isinstance(source.config, StudentConfig)
    isolated = student.config.isolated
    new = [n for n in student.targets if n not in source.targets and n not in isolated]
    if new:
        raise RecipeError(
            f"student.isolated: must name {', '.join(new)}, new to {init.path}; else other tokens "
            "would attend to the new class token and, as the trunk is frozen, change every old "
            "output"
        )
    gone = [n for n in source.targets if n not in student.targets]
    if gone:
        raise RecipeError(
            f"teachers: {init.path} has a class token of {', '.join(gone)}, which other tokens "
            "attend to; with a frozen trunk it must stay: list the teacher, and set both its "
            "objective.weights to zero"
        )
    before = set(source.config.isolated)
    if before != set(isolated) & set(source.targets):
        raise RecipeError(
            f"student.isolated: of the teachers in {init.path} it must name "
            f"{', '.join(sorted(before)) or 'none'}, as that file does; with a frozen trunk every "
            "old output would change otherwise"
        )


def _only(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient * rows.to(gradient.device)
