"""Teacher dropping: for each image, some teachers are silent, but never the worst-matched one.

After UNIC (Sariyildiz et al., arXiv 2408.05088): the teacher that the student follows
least well is always kept, every other one dropped with a probability, and the weights of those left
are raised so that an image counts the same, whatever was dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_shares(
    losses: Sequence[Tensor], probability: float, generator: torch.Generator
) -> list[Tensor]:
    """How much each teacher counts for each image.

    Args:
        losses: of each teacher, (B,); without a graph.
        probability: that a teacher other than the worst-matched is dropped.
        generator: on the CPU.

    Returns:
        For each teacher (B,): 0 where it is dropped, else the number of teachers over the number
        of those kept.
    """
    table = torch.stack(list(losses))
    drawn = torch.rand(table.shape, generator=generator).to(table.device)
    kept = drawn >= probability
    kept.scatter_(0, table.argmax(0, keepdim=True), True)
    shares = kept.float() * len(table) / kept.sum(0)
    return list(shares)
