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
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from distill.errors import RecipeError
from distill.low_rank import add_low_rank
from student.config import StudentInit
from student.model import Student
from student.storage import read_student


class FinetuningConfig(BaseModel):
    """What of the trunk is trained.

    Attributes:
        trunk: `frozen`, or `low_rank`: LoRA on every linear layer of its blocks.
        rank: of the updates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        RecipeError: a new teacher's class token would be read by a frozen trunk's other tokens.
    """
    old = set(read_student(init.path).targets)
    loose = [n for n in student.targets if n not in old and n not in student.config.isolated]
    if config.trunk == "frozen" and loose:
        raise RecipeError(
            f"student.isolated: must name {', '.join(loose)}, new to {init.path}: other tokens "
            "would read the new class token, and with a frozen trunk no old output would stay"
        )
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


def _only(gradient: Tensor, rows: Tensor) -> Tensor:
    return gradient * rows.to(gradient.device)
