"""Teaching a trained student one more teacher without losing those it has.

What is trained: the heads of the teachers that are run, the class tokens that the initial student
does not have and, with `low_rank`, small updates of the trunk's linear layers. All else stays as it
was, weight decay included. With a frozen trunk and the new teachers named in `student.isolated`,
every old output stays what it was; with low-rank updates it moves, and the old teachers hold it
where they are run along.
"""

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from distill.parametrization.lora import add_low_rank
from distill.runtime.errors import RecipeError
from student.config import StudentInit
from student.model import Student
from student.storage import StudentHeader, read_header
from teachers.config import StrictConfig


class FinetuningConfig(StrictConfig):
    """What of the trunk is trained.

    Attributes:
        trunk: `frozen`, or `low_rank`: LoRA on every linear layer of its blocks.
        rank: of the updates.
    """

    trunk: Literal["frozen", "low_rank"]
    rank: PositiveInt = 16


def freeze(
    student: Student, init: StudentInit, config: FinetuningConfig, running: Collection[str]
) -> None:
    """Freezes a student in place, but for what is to be trained.

    Args:
        student: with the initial weights.
        init: where they come from.
        config: what of the trunk is trained.
        running: the teachers that are run.

    Raises:
        RecipeError: with a frozen trunk, tokens would read other class tokens than they did.
    """
    source = read_header(init.path)
    old = set(source.targets)
    if config.trunk == "frozen":
        _check_tokens(student, source, init)
    student.trunk.requires_grad_(False)
    for name, head in student.heads.items():
        head.requires_grad_(name in running)
    tokens = student.trunk.embedding.class_tokens
    fresh = torch.tensor([[name not in old] for name in student.targets])
    if fresh.any():
        tokens.requires_grad_(True)
        tokens.register_hook(lambda gradient: _only(gradient, fresh))
    if config.trunk == "low_rank":
        add_low_rank(student.trunk.blocks, config.rank)


def _check_tokens(student: Student, source: StudentHeader, init: StudentInit) -> None:
    """What the trunk's tokens read must be what they read in the file."""
    isolated = student.config.isolated
    loose = [n for n in student.targets if n not in source.targets and n not in isolated]
    if loose:
        raise RecipeError(
            f"student.isolated: must name {', '.join(loose)}, new to {init.path}: other tokens "
            "would read the new class token, and with a frozen trunk no old output would stay"
        )
    gone = [n for n in source.targets if n not in student.targets]
    if gone:
        raise RecipeError(
            f"teachers: {init.path} has a class token of {', '.join(gone)}, which other tokens "
            "read; with a frozen trunk it must stay: list the teacher, with both its "
            "objective.weights at zero"
        )
    before = set(source.config.isolated)
    if before != set(isolated) & set(source.targets):
        raise RecipeError(
            f"student.isolated: of the teachers in {init.path} it must name "
            f"{', '.join(sorted(before)) or 'none'}, as that file does; with a frozen trunk no old "
            "output would stay otherwise"
        )


def _only(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient * rows.to(gradient.device)
