"""ZeRO's flat tensors, written by one number of ranks or one stage and read by another.

DeepSpeed 0.19.8 loads its checkpoints with as many ranks as wrote them, at their stage. ZeRO 1 and
2 pad the flat tensor of a group and cut it into equal shares; ZeRO 3 pads and cuts each parameter
by itself and lays a rank's pieces one behind the other. Putting them together and cutting anew
changes no bit.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Where a rank's state has torch's optimiser and the float32 weights; True is for ZeRO 3.
_KEYS = {
    False: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    True: ("optimizer_state_dict", "fp32_flat_groups"),
}
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
Cut = Callable[[Sequence[Tensor], int], Tensor]


def cut_flat(shares: Sequence[Tensor], sizes: Sequence[int], rank: int, width: int) -> Tensor:
    """One rank's share under ZeRO 1 and 2.

    Args:
        shares: flat, of the ranks that wrote them, in their order; the last may be padded.
        sizes: elements of the parameters, one behind the other.
        rank: whose share is due.
        width: elements of a share, the same for all ranks.

    Returns:
        (width,), padded with zeros behind the last parameter.
    """
    whole = torch.cat(list(shares))[: sum(sizes)]
    mine = whole[rank * width : (rank + 1) * width]
    return F.pad(mine, (0, width - len(mine)))


def cut_parameters(shares: Sequence[Tensor], sizes: Sequence[int], rank: int, ranks: int) -> Tensor:
    """One rank's share under ZeRO 3, where each parameter is padded and cut by itself.

    Args:
        shares: flat, of the ranks that wrote them, in their order.
        sizes: elements of the parameters.
        rank: whose share is due.
        ranks: among how many.

    Returns:
        Flat.
    """
    pieces = [share.split([-(-n // len(shares)) for n in sizes]) for share in shares]
    mine = []
    for number, n in enumerate(sizes):
        whole = torch.cat([of_rank[number] for of_rank in pieces])[:n]
        width = -(-n // ranks)
        mine.append(cut_flat([whole], [n], rank, width))
    return torch.cat(mine)


def join(shares: Sequence[Tensor], sizes: Sequence[int], *, by_parameter: bool) -> Tensor:
    """A group's parameters one behind the other, flat and without padding.

    Args:
        shares: flat, of the ranks that wrote them, in their order.
        sizes: elements of the parameters.
        by_parameter: whether they were written under ZeRO 3.
    """
    if by_parameter:
        return cut_parameters(shares, sizes, 0, 1)
    return torch.cat(list(shares))[: sum(sizes)]


def written_by_parameter(folder: Path) -> bool:
    """Whether a checkpoint of DeepSpeed's is of ZeRO 3."""
    return not (folder / _WHOLE_MODEL).exists()


def weights_of(states: Sequence[Mapping[str, Any]], *, by_parameter: bool) -> list[list[Tensor]]:
    """For each group the shares of its float32 weights."""
    groups = zip(*(state[_KEYS[by_parameter][1]] for state in states), strict=True)
    return [list(shares) for shares in groups]


def read_ranks(folder: Path, ranks: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads what DeepSpeed wrote on every rank.

    Args:
        folder: of DeepSpeed's checkpoint.
        ranks: how many wrote it.

    Returns:
        The state of the module, whole except under ZeRO 3, and of each rank's optimiser.
    """
    split = written_by_parameter(folder)
    model = "zero_pp_rank_0_mp_rank_00_model_states.pt" if split else _WHOLE_MODEL
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    states = [_read(folder / name)["optimizer_state_dict"] for name in names]
    return _read(folder / model), states


def _read(file: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, which holds an object of its own: its loss scaler."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return content


def reshard_state(
    states: Sequence[Mapping[str, Any]],
    cut: Cut,
    own: Mapping[str, Any],
    *,
    from_stage_3: bool,
    to_stage_3: bool,
) -> dict[str, Any]:
    """One rank's state of DeepSpeed's ZeRO optimiser, as DeepSpeed would load it.

    Args:
        states: those of the ranks that wrote them, in their order.
        cut: makes this rank's share of group number i out of the shares of all.
        own: the state that this rank's optimiser has before, for what only its stage writes.
        from_stage_3: whether they were written under ZeRO 3.
        to_stage_3: whether they are read under it.
    """
    first, optimizer = states[0], _KEYS[from_stage_3][0]
    moments: dict[int, dict[str, Any]] = {}
    for group, named in first[optimizer]["state"].items():
        moments[group] = {
            name: cut([s[optimizer]["state"][group][name] for s in states], group)
            if torch.is_tensor(value) and value.ndim
            else value  # a count of steps, which all ranks share
            for name, value in named.items()
        }
    groups = enumerate(weights_of(states, by_parameter=from_stage_3))
    due_optimizer, due_weights = _KEYS[to_stage_3]
    return {
        **own,
        **{key: value for key, value in first.items() if key in own},
        "zero_stage": own["zero_stage"],
        due_optimizer: {**first[optimizer], "state": moments},
        due_weights: [cut(shares, number) for number, shares in groups],
    }
