"""The engine on DeepSpeed: steps, weights and their average, checkpoints.

Schedules, losses and the decision when to save belong to others.

Facts about DeepSpeed 0.19.8 behind the code, each checked by a test in `tests/canary`:
gradients are accumulated here (`managed_gradient_accumulation: false`), because two backward passes
before one step lose the first under ZeRO 1 and 2; ZeRO 0 is refused, because it does not check for
non-finite gradients; ZeRO 3 must not replace `torch.nn.functional.linear`, which would change the
teachers too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.batch_norms import FILE as BATCH_NORMS
from distill.engine.batch_norms import BatchNorms
from distill.engine.deepspeed_library import (
    errors_kept,
    float32_slices,
    gathered_weights,
    groups_that_wait,
    import_deepspeed,
    require_precision,
    time_collectives,
)
from distill.engine.ema import AveragedModule
from distill.engine.engine import Autocast, StepResult
from distill.engine.engine_config import EngineConfig, deepspeed_config, why_no_whole_average
from distill.engine.optimizer import OptimizerConfig, ParameterGroup, build_optimizer
from distill.engine.resharding import Resharding
from distill.runtime import distributed


class DeepSpeedEngine:
    """A module under DeepSpeed, with an average of its weights; see `Engine` for the methods.

    Args:
        module: what is trained; all its computation goes through its one `forward`.
        config: ZeRO stage, precision, clipping, averaging.
        optimizer: which one, and its options.
        groups: the module's parameters, see `decay_groups`.
        micro_batch_size: images of one forward pass on one rank.
        whole_average: whether every rank keeps the whole average, as a module that runs, instead of
            a slice of it; see `why_no_whole_average`.
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
        self._norms = BatchNorms(module, config.ema_decay)
        with groups_that_wait():
            self._engine, *_ = deepspeed.initialize(
                model=Autocast(module, config.precision),
                optimizer=build_optimizer(optimizer, groups),
                config=deepspeed_config(config, micro_batch_size),
                dist_init_required=False,
            )
        time_collectives()
        self._share_weights()
        in_slices = bool(config.ema_decay) and not whole_average
        self._average = [s.detach().clone() for s in self._slices()] if in_slices else []

    def __call__(self, *inputs: Any) -> Any:
        """See `Engine`."""
        return self._engine(*inputs)

    @property
    def steps(self) -> int:
        """See `Engine`."""
        return int(self._engine.global_steps)

    @property
    def averaged(self) -> nn.Module | None:
        """See `Engine`."""
        return self._averaged.module if self._averaged else None

    def train(self, mode: bool = True) -> None:
        """See `Engine`."""
        self._engine.module.train(mode)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """See `Engine`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * self._groups[group["name"]].lr_scale
        before = self._engine.skipped_steps
        self._engine.step()
        skipped = self._engine.skipped_steps > before
        if self._average and not skipped:
            torch._foreach_lerp_(self._average, self._slices(), 1 - self.config.ema_decay)
        self._norms.follow(self.steps, skipped=skipped)
        if self._averaged and not skipped:
            self._averaged.follow(self._engine.module.module)
            self._norms.write_into(self._averaged.module)
        norm = float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped, float(getattr(self._engine.optimizer, "loss_scale", 1.0)))

    def weights(self, *, average: bool = True) -> dict[str, Tensor]:
        """See `Engine`."""
        if average and self._averaged:
            return self._averaged.weights()
        with self._average_in_place(average and bool(self._average)):
            found = gathered_weights(self._engine.module.module)
        if average:
            found |= {name: value.cpu().clone() for name, value in self._norms.averaged().items()}
        return found

    def save(self, folder: Path) -> None:
        """See `Engine`; every rank writes its slice of the average."""
        with errors_kept(self._engine) as raise_kept:
            self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        distributed.on_all_ranks(raise_kept)
        if self._average:
            torch.save(self._average, folder / f"average_{distributed.rank()}.pt")
        if self._averaged and distributed.rank() == 0:
            torch.save(self._averaged.weights(), folder / "average.pt")
        if (averaged := self._norms.averaged()) and distributed.rank() == 0:
            torch.save(averaged, folder / BATCH_NORMS)

    def load(self, folder: Path, *, ranks: int) -> None:
        """See `Engine`; cuts the slices anew for another number of ranks, and from or to ZeRO 3."""
        resharding = Resharding(self._engine, folder / "engine", ranks)
        if resharding.needed:
            resharding.load()
        elif self._engine.load_checkpoint(str(folder), tag="engine")[0] is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint in it")
        if self._average:
            writers = range(ranks) if resharding.needed else [distributed.rank()]
            files = [folder / f"average_{rank}.pt" for rank in writers]
            stored = [torch.load(file, map_location=distributed.device()) for file in files]
            mine = resharding.cut_groups(stored) if resharding.needed else stored[0]
            torch._foreach_copy_(self._average, mine)
        if self._averaged:
            self._averaged.restore(torch.load(folder / "average.pt"))
        file = folder / BATCH_NORMS
        device = distributed.device()
        self._norms.restore(torch.load(file, map_location=device) if file.is_file() else None)
        self._apply_options()

    def close(self) -> None:
        """See `Engine`."""
        self._engine.destroy()

    def _apply_options(self) -> None:
        """Puts the recipe's options in place of those that a checkpoint restored."""
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["weight_decay"] = self._groups[group["name"]].weight_decay
            group["betas"] = self._optimizer_config.betas
            group["eps"] = self._optimizer_config.eps
        optimizer.clip_grad = self.config.gradient_clipping

    def _slices(self) -> list[Tensor]:
        return float32_slices(self._engine)

    def _share_weights(self) -> None:
        """Makes ZeRO's float32 slices the module's own weights if they only copy them.

        That is the case in a single process, unless the weights are float16. With several ranks
        each holds a slice, and saving a slice that is a view would save the whole tensor.
        """
        config, optimizer = self.config, self._engine.optimizer
        if config.zero_stage == 3 or config.precision == "fp16" or distributed.world_size() > 1:
            return
        for own, weights in zip(self._slices(), optimizer.bit16_groups_flat, strict=True):
            own.data = weights
        optimizer._link_all_hp_params()  # its views still hold the copies

    @contextmanager
    def _average_in_place(self, enabled: bool) -> Iterator[None]:
        """Puts the average in the place of the float32 slices, for the time of a gather."""
        slices = [s.data for s in self._slices()]
        kept = [s.clone() for s in slices] if enabled else []
        try:
            if enabled:
                torch._foreach_copy_(slices, self._average)
            yield
        finally:
            if enabled:
                torch._foreach_copy_(slices, kept)
