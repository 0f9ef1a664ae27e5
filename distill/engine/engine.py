"""DeepSpeed behind a small interface: steps, weights and their average, checkpoints.

What this module does not do: schedules, losses, and when to save.

Facts about DeepSpeed 0.19.8 that shape it, each held by a test in `tests/canary`:
accumulation is ours (`managed_gradient_accumulation: false`), because two backward passes before
one step lose the first under ZeRO 1 and 2; ZeRO 0 is refused, because it has no check for
non-finite gradients; ZeRO 3 must not replace `torch.nn.functional.linear`, which would change the
teachers too.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.engine.deepspeed_library import (
    errors_kept,
    import_deepspeed,
    require_precision,
    time_collectives,
    whole_weights,
)
from distill.engine.ema import AveragedModule
from distill.engine.engine_config import EngineConfig, deepspeed_config, why_no_whole_average
from distill.engine.optimizer import OptimizerConfig, ParameterGroup, build_optimizer
from distill.engine.resharding import (
    cut_flat,
    cut_parameters,
    join,
    read_ranks,
    reshard_state,
    weights_of,
    written_by_parameter,
)
from distill.runtime import distributed


class StepResult(NamedTuple):
    """What one optimiser step reports.

    Attributes:
        grad_norm: norm of the gradient before clipping; infinite where it was not finite.
        skipped: whether the step was left out because the gradient was not finite.
        loss_scale: fp16's loss scale; 1 in other precisions.
    """

    grad_norm: float
    skipped: bool
    loss_scale: float


class Autocast(nn.Module):
    """Runs a module under bfloat16 autocast, or as it is."""

    def __init__(self, module: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.module = module
        self.enabled = enabled

    def forward(self, *inputs: Any) -> Any:
        """Calls the module, whose first input is a tensor."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.enabled):
            return self.module(*inputs)


class Engine:
    """A module under DeepSpeed, with an average of its weights.

    Args:
        module: what is trained; everything it computes goes through its one `forward`.
        config: stage, precision, clipping, averaging.
        optimizer: which one, and its options.
        groups: of the module's parameters, see `decay_groups`.
        micro_batch_size: images a rank and forward pass.
        whole_average: whether every rank keeps all of the average, as a module that runs; see
            `why_no_whole_average`.
    """

    def __init__(
        self,
        module: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        groups: Sequence[ParameterGroup],
        *,
        micro_batch_size: int,
        whole_average: bool = False,
    ) -> None:
        deepspeed = import_deepspeed()
        require_precision(config)
        self.config = config
        self._optimizer_config = optimizer
        self._groups = {group.name: group for group in groups}
        module.to(distributed.device()).train()
        self._averaged: AveragedModule[nn.Module] | None = None
        if whole_average:
            assert why_no_whole_average(config) is None
            self._averaged = AveragedModule(module, config.ema_decay)
        wrapped = Autocast(module, enabled=config.precision == "bf16")
        self._engine, *_ = deepspeed.initialize(
            model=wrapped,
            optimizer=build_optimizer(optimizer, groups),
            config=deepspeed_config(config, micro_batch_size),
            dist_init_required=False,
        )
        time_collectives()
        self._share_weights()
        in_slices = bool(config.ema_decay) and not whole_average
        self._average = [p.detach().clone() for p in self._masters()] if in_slices else []

    def __call__(self, *inputs: Any) -> Any:
        """Runs the module's forward pass."""
        return self._engine(*inputs)

    @property
    def steps(self) -> int:
        """Optimiser steps done, those left out included; a checkpoint restores it."""
        return int(self._engine.global_steps)

    @property
    def averaged(self) -> nn.Module:
        """The average as a module, frozen and in evaluation mode, where there is a whole one."""
        assert self._averaged is not None
        return self._averaged.module

    def train(self, mode: bool = True) -> None:
        """Switches the module between training and evaluation."""
        self._engine.module.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, which the caller has already weighted, to this step's."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Clips, updates the weights and their average, clears gradients.

        Args:
            lr: the step's learning rate, before each group's own scale.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * self._groups[group["name"]].lr_scale
        before = self._engine.skipped_steps
        self._engine.step()
        skipped = self._engine.skipped_steps > before
        if self._average and not skipped:
            torch._foreach_lerp_(self._average, self._masters(), 1 - self.config.ema_decay)
        if self._averaged and not skipped:
            self._averaged.follow(self._engine.module.module)
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped, float(getattr(self._engine.optimizer, "loss_scale", 1.0)))

    def weights(self, *, average: bool = True) -> dict[str, Tensor]:
        """The whole module's float32 weights on the CPU, gathered from all ranks.

        Every rank must call this. The names are the module's own.

        Args:
            average: the moving average where there is one, else the current weights.
        """
        if average and self._averaged:
            return self._averaged.weights()
        with self._average_in_place(average and bool(self._average)):
            return whole_weights(self._engine.module.module)

    def save(self, folder: Path) -> None:
        """Writes weights and optimiser state; every rank writes its part of the average.

        Raises:
            AnyRankFailed: on every rank, where one could not write.
        """
        with errors_kept(self._engine) as raise_kept:
            self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        distributed.on_all_ranks(raise_kept)
        if self._average:
            torch.save(self._average, folder / f"average_{distributed.rank()}.pt")
        if self._averaged and distributed.rank() == 0:
            torch.save(self._averaged.weights(), folder / "average.pt")

    def load(self, folder: Path, *, ranks: int) -> None:
        """Restores what `save` wrote, then applies this run's own options over the stored ones.

        Args:
            folder: of a checkpoint.
            ranks: how many wrote it; where there are others now, or ZeRO 3 on one side only, its
                shares are cut anew.
        """
        from_stage_3 = written_by_parameter(folder / "engine")
        same = ranks == distributed.world_size() and from_stage_3 == self._in_stage_3
        if same:
            path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
            if path is None:
                raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint in it")
        else:
            self._load_resharded(folder / "engine", ranks)
        if self._average:
            self._load_average(folder, ranks, None if same else from_stage_3)
        if self._averaged:
            self._averaged.restore(torch.load(folder / "average.pt"))
        self._apply_options()

    def close(self) -> None:
        """Lets go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()

    def _apply_options(self) -> None:
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["weight_decay"] = self._groups[group["name"]].weight_decay
            group["betas"] = self._optimizer_config.betas
            group["eps"] = self._optimizer_config.eps
        optimizer.clip_grad = self.config.gradient_clipping

    @property
    def _in_stage_3(self) -> bool:
        return self.config.zero_stage == 3

    def _load_average(self, folder: Path, ranks: int, from_stage_3: bool | None) -> None:
        """The average; `from_stage_3` is None where this rank wrote its own share as it is now."""
        same = from_stage_3 is None
        writers = [distributed.rank()] if same else range(ranks)
        files = [folder / f"average_{rank}.pt" for rank in writers]
        stored = [torch.load(file, map_location=distributed.device()) for file in files]
        groups = enumerate(zip(*stored, strict=True))
        cut = functools.partial(self._cut, from_stage_3=bool(from_stage_3))
        mine = stored[0] if same else [cut(shares, number) for number, shares in groups]
        torch._foreach_copy_(self._average, mine)

    def _load_resharded(self, folder: Path, ranks: int) -> None:
        """What DeepSpeed's own loading does, with this rank's share of what other ranks wrote."""
        optimizer, module = self._engine.optimizer, self._engine.module
        to_stage_3, from_stage_3 = self._in_stage_3, written_by_parameter(folder)
        model, states = read_ranks(folder, ranks)
        if to_stage_3:
            optimizer.checkpoint_event_prologue()
        if to_stage_3 or from_stage_3:
            for name, buffer in module.named_buffers():
                if name in model["module"]:
                    buffer.copy_(model["module"][name])
        else:
            module.load_state_dict(model["module"])
        if from_stage_3 and not to_stage_3:
            self._fill(weights_of(states, by_parameter=True))
        state = reshard_state(
            states,
            functools.partial(self._cut, from_stage_3=from_stage_3),
            optimizer.state_dict(),
            from_stage_3=from_stage_3,
            to_stage_3=to_stage_3,
        )
        optimizer.load_state_dict([state] * distributed.world_size())  # which takes its rank's
        if to_stage_3:
            optimizer.checkpoint_event_epilogue()
        for name in ("global_steps", "skipped_steps"):
            setattr(self._engine, name, model[name])

    def _fill(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Sets the whole weights from the shares that ZeRO 3 wrote, which keeps no others."""
        parameters = self._engine.optimizer.bit16_groups
        for group, shares in zip(parameters, groups, strict=True):
            sizes = [parameter.numel() for parameter in group]
            pieces = join(shares, sizes, by_parameter=True).split(sizes)
            for parameter, piece in zip(group, pieces, strict=True):
                parameter.data.copy_(piece.view_as(parameter))

    def _cut(self, shares: Sequence[Tensor], group: int, *, from_stage_3: bool) -> Tensor:
        """This rank's share of a group's flat tensor, out of those of other ranks."""
        optimizer, rank = self._engine.optimizer, distributed.rank()
        if self._in_stage_3:
            sizes = [parameter.ds_numel for parameter in optimizer.fp16_groups[group]]
            whole = join(shares, sizes, by_parameter=from_stage_3)
            return cut_parameters([whole], sizes, rank, distributed.world_size())
        sizes = [parameter.numel() for parameter in optimizer.bit16_groups[group]]
        whole = join(shares, sizes, by_parameter=from_stage_3)
        return cut_flat([whole], sizes, rank, len(self._masters()[group]))

    def _masters(self) -> list[Tensor]:
        """This rank's float32 partitions: flat private tensors, whose names a canary test holds."""
        if self.config.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _share_weights(self) -> None:
        """Makes ZeRO's float32 partition the module's own weights, where it is a copy of them.

        That is so in one process, unless the weights are float16. Where there are more, each holds
        a slice, and a checkpoint of a slice that is a view would hold the whole.
        """
        config, optimizer = self.config, self._engine.optimizer
        if config.zero_stage == 3 or config.precision == "fp16" or distributed.world_size() > 1:
            return
        flat = optimizer.bit16_groups_flat
        for master, weights in zip(optimizer.single_partition_of_fp32_groups, flat, strict=True):
            master.data = weights
        optimizer._link_all_hp_params()  # its views hold on to the copies

    @contextmanager
    def _average_in_place(self, enabled: bool) -> Iterator[None]:
        """The average in the place of the float32 weights, for the time of a gather."""
        masters = [p.data for p in self._masters()]
        kept = [p.clone() for p in masters] if enabled else []
        try:
            if enabled:
                torch._foreach_copy_(masters, self._average)
            yield
        finally:
            if enabled:
                torch._foreach_copy_(masters, kept)
