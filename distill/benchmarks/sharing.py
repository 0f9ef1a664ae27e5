"""Division of a benchmark's work among ranks.

Each rank encodes its share of the images, which is most of the work. Heads are small: every rank
trains the same head on the gathered features, so that any number of ranks gives the same metrics.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from distill.runtime import distributed


def own_share(count: int) -> range:
    """This rank's share of the numbers below `count`."""
    return range(distributed.rank(), count, distributed.world_size())


def gather_shares(own: Tensor, count: int) -> Tensor:
    """Gathers the results of all ranks' shares.

    Args:
        own: (len(own_share(count)), ...), one row for each number of this rank's share; the other
            dimensions and the dtype are the same on all ranks.
        count: of rows over all ranks.

    Returns:
        (count, ...) in the order of the numbers, on every rank.
    """
    world = distributed.world_size()
    if not dist.is_initialized() or world == 1:
        return own
    most = -(-count // world)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:count]
