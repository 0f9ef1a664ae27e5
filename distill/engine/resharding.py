"""Loads checkpoints of DeepSpeed that another number of ranks, or another ZeRO stage, wrote.

DeepSpeed 0.19.8 itself loads a checkpoint only with as many ranks as wrote it, at the same stage.
ZeRO 1 and 2 pad the flat tensor of a parameter group and cut it into one equal slice a rank. ZeRO 3
pads and cuts each parameter by itself; a rank's slice of a group is its pieces one behind the
other. Joining the slices and cutting them anew changes no bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.engine.deepspeed_library import float32_slices
from distill.runtime import distributed

# Where the state of a rank keeps torch's optimizer and the float32 weights; True is for ZeRO 3.
_KEYS = {
    False: ("base_optimizer_state", "single_partition_of_fp32_groups"),
    True: ("optimizer_state_dict", "fp32_flat_groups"),
}
_WHOLE_MODEL = "mp_rank_00_model_states.pt"
_MODEL_OF_RANK_0 = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # under ZeRO 3


def written_by_stage_3(folder: Path) -> bool:
    """Whether ZeRO 3 wrote a checkpoint of DeepSpeed."""
    return not (folder / _WHOLE_MODEL).exists()


def join(slices: Sequence[Tensor], sizes: Sequence[int], *, from_stage_3: bool) -> Tensor:
    """The parameters of a group one behind the other, flat and without padding.

    Args:
        slices: flat, of all ranks in their order; the padding may be missing.
        sizes: number of elements of each parameter.
        from_stage_3: whether ZeRO 3 cut them.
    """
    if not from_stage_3:
        return torch.cat(list(slices))[: sum(sizes)]
    pieces = [s.split([-(-n // len(slices)) for n in sizes]) for s in slices]
    by_parameter = zip(sizes, zip(*pieces, strict=True), strict=True)
    return torch.cat([torch.cat(of_ranks)[:n] for n, of_ranks in by_parameter])


def cut_flat(whole: Tensor, rank: int, width: int) -> Tensor:
    """A rank's slice under ZeRO 1 and 2, (width,), with zeros behind the last parameter.

    Args:
        whole: see `join`.
        rank: whose slice.
        width: number of elements of a slice, the same for all ranks.
    """
    mine = whole[rank * width : (rank + 1) * width]
    return F.pad(mine, (0, width - len(mine)))


def cut_parameters(whole: Tensor, sizes: Sequence[int], rank: int, ranks: int) -> Tensor:
    """A rank's flat slice of what `join` returns, under ZeRO 3, for parameters of some sizes."""
    return torch.cat([cut_flat(p, rank, -(-len(p) // ranks)) for p in whole.split(list(sizes))])


class Resharding:
    """A checkpoint of DeepSpeed, read by ranks that may not be those that wrote it.

    Args:
        engine: DeepSpeed's.
        folder: of DeepSpeed's files.
        ranks: number of ranks that wrote it.

    Attributes:
        needed: whether DeepSpeed's own loading cannot read it.
    """

    def __init__(self, engine: Any, folder: Path, ranks: int) -> None:
        self._engine, self._folder, self._ranks = engine, folder, ranks
        self._from_stage_3 = written_by_stage_3(folder)
        self._to_stage_3 = engine.zero_optimization_stage() == 3
        same_stage = self._from_stage_3 == self._to_stage_3
        self.needed = not same_stage or ranks != distributed.world_size()

    def load(self) -> None:
        """Does what DeepSpeed's own loading does, with this rank's slice of what others wrote."""
        optimizer, module = self._engine.optimizer, self._engine.module
        model, states = self._read()
        if self._to_stage_3:
            optimizer.checkpoint_event_prologue()
        if self._to_stage_3 or self._from_stage_3:
            for name, buffer in module.named_buffers():
                if name in model["module"]:
                    buffer.copy_(model["module"][name])
        else:
            module.load_state_dict(model["module"])
        if self._from_stage_3 and not self._to_stage_3:
            self._fill([state[_KEYS[True][1]] for state in states])
        state = self.merge(states, optimizer.state_dict())
        optimizer.load_state_dict([state] * distributed.world_size())  # it takes that of its rank
        if self._to_stage_3:
            optimizer.checkpoint_event_epilogue()
        for name in ("global_steps", "skipped_steps"):
            setattr(self._engine, name, model[name])

    def cut_groups(self, ranks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """This rank's slice of each group, from the slices that each rank wrote of all groups."""
        return [self._cut(slices, i) for i, slices in enumerate(zip(*ranks, strict=True))]

    def merge(self, states: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> dict[str, Any]:
        """The state of this rank's ZeRO optimizer, as DeepSpeed would load it.

        Args:
            states: what each rank wrote, in their order.
            own: the state of this rank's optimizer, for the entries that only its stage has.
        """
        first, (optimizer, weights) = states[0], _KEYS[self._from_stage_3]
        moments: dict[int, dict[str, Any]] = {}
        for group, named in first[optimizer]["state"].items():
            moments[group] = {
                name: self._cut([s[optimizer]["state"][group][name] for s in states], group)
                if torch.is_tensor(value) and value.ndim
                else value  # a count of steps, the same on all ranks
                for name, value in named.items()
            }
        own_optimizer, own_weights = _KEYS[self._to_stage_3]
        return {
            **own,
            **{key: value for key, value in first.items() if key in own},
            "zero_stage": own["zero_stage"],
            own_optimizer: {**first[optimizer], "state": moments},
            own_weights: self.cut_groups(state[weights] for state in states),
        }

    def _cut(self, slices: Sequence[Tensor], group: int) -> Tensor:
        """This rank's slice of a group, from those that each rank wrote."""
        optimizer, rank = self._engine.optimizer, distributed.rank()
        if self._to_stage_3:
            sizes = [parameter.ds_numel for parameter in optimizer.fp16_groups[group]]
            whole = join(slices, sizes, from_stage_3=self._from_stage_3)
            return cut_parameters(whole, sizes, rank, distributed.world_size())
        sizes = [parameter.numel() for parameter in optimizer.bit16_groups[group]]
        whole = join(slices, sizes, from_stage_3=self._from_stage_3)
        return cut_flat(whole, rank, len(float32_slices(self._engine)[group]))

    def _fill(self, ranks: Iterable[Sequence[Tensor]]) -> None:
        """Sets the whole weights from the slices of all groups: ZeRO 3 writes nothing else."""
        groups = zip(self._engine.optimizer.bit16_groups, zip(*ranks, strict=True), strict=True)
        for parameters, slices in groups:
            sizes = [parameter.numel() for parameter in parameters]
            pieces = join(slices, sizes, from_stage_3=True).split(sizes)
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.data.copy_(piece.view_as(parameter))

    def _read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The state of the module, whole except under ZeRO 3, and of each rank's optimizer."""

        def load(name: str) -> dict[str, Any]:
            # Not only weights: the files hold DeepSpeed's loss scaler, an object.
            content: dict[str, Any] = torch.load(
                self._folder / name, map_location="cpu", weights_only=False
            )
            return content

        names = [f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in range(self._ranks)]
        states = [load(name)["optimizer_state_dict"] for name in names]
        return load(_MODEL_OF_RANK_0 if self._from_stage_3 else _WHOLE_MODEL), states
