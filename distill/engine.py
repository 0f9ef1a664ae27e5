"""DeepSpeed behind a small interface; the only module that imports it.

Every key of DeepSpeed's dictionary is generated here from typed fields, because DeepSpeed accepts a
misspelt key in silence and has defaults that change results (it clips gradients at 1.0 when told
nothing). What this module does not do: schedules, losses, and when to save.

Facts about DeepSpeed 0.19.8 that shape it, each held by a test in `tests/canary`:
accumulation is ours (`managed_gradient_accumulation: false`), because two backward passes before
one step lose the first under ZeRO 1 and 2; ZeRO 0 is refused, because it has no check for
non-finite gradients; ZeRO 3 must not replace `torch.nn.functional.linear`, which would change the
teachers too.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from distill import distributed, timing
from distill.average import AveragedModule
from distill.errors import RecipeError
from distill.optimizer import OptimizerConfig, ParameterGroup, build_optimizer, flat_size
from distill.resharding import (
    cut_flat,
    cut_parameters,
    join,
    read_ranks,
    reshard_state,
    weights_of,
    written_by_parameter,
)

_COLLECTIVES = ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


class EngineConfig(BaseModel):
    """How the student is trained over the processes.

    Attributes:
        zero_stage: what the ranks split: 1 optimiser state, 2 also gradients, 3 also weights.
        precision: `bf16` keeps float32 weights and runs the trunk under autocast; `fp16` trains
            float16 weights with a float32 master copy and a dynamic loss scale. Under either a
            GPU multiplies what stays float32 as TF32.
        gradient_clipping: largest norm of the gradient; 0 does not clip.
        ema_decay: decay of the exponential moving average of the weights, which is then what is
            exported; 0 keeps none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    zero_stage: int = 2
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_clipping: float = Field(1.0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)

    @field_validator("zero_stage")
    @classmethod
    def _stage(cls, stage: int) -> int:
        if stage == 0:
            raise ValueError(
                "ZeRO 0 is not offered: in 0.19 it neither checks gradients for NaN in fp32 nor "
                "counts Adam's steps right in bf16; use 1, also on one process"
            )
        if stage not in (1, 2, 3):
            raise ValueError(f"must be 1, 2 or 3, got {stage}")
        return stage


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


def why_no_whole_average(config: EngineConfig) -> str | None:
    """Why the average cannot run as a module, with the key at fault; None where it can."""
    if not config.ema_decay:
        return "engine.ema_decay: is 0, so there is no average; C-RADIOv4 has 0.9996"
    if config.zero_stage == 3:
        return "engine.zero_stage: 3 leaves no rank with all the weights to average; use 1 or 2"
    if config.precision == "fp16":
        return "engine.precision: an average of fp16 weights would stand still; use bf16, or fp32"
    return None


def deepspeed_config(config: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, with every key that matters written out."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            # Gradients stay where autograd puts them, and are reduced a bucket at a time. DeepSpeed
            # would copy them into one buffer, 2 GB whatever the module's size, and from there into
            # a second one as large as all of them.
            "contiguous_gradients": False,
            "reduce_bucket_size": flat_size(),
            # Stage 3 would split a rank's slice into groups of 1e9, other ones for other ranks.
            "sub_group_size": 10**12,
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": False},
        "fp16": {"enabled": config.precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "communication_data_type": "fp32",
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": sys.maxsize,
        "wall_clock_breakdown": False,
    }


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
        deepspeed = _import_deepspeed()
        _require_precision(config)
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
        _time_collectives()
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
            return self._gathered()

    def save(self, folder: Path) -> None:
        """Writes weights and optimiser state; every rank writes its part of the average.

        Raises:
            RankError: on every rank, where one could not write.
        """
        with _errors_kept(self._engine) as raise_kept:
            self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        distributed.together(raise_kept)
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

    def _gathered(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        module = self._engine.module.module
        weights = {name: b.detach().cpu().clone() for name, b in module.named_buffers()}
        persistent = set(module.state_dict().keys())
        weights = {name: b for name, b in weights.items() if name in persistent}
        for name, parameter in module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter
            weights[name] = full.detach().float().cpu().clone()
        return weights


@contextmanager
def _errors_kept(engine: Any) -> Iterator[Callable[[], None]]:
    """Keeps the errors of DeepSpeed's file writer, to be raised after its collectives.

    A rank that left `save_checkpoint` at a full disk would leave its peers in the barrier behind.
    """
    errors: list[Exception] = []
    writer = engine.checkpoint_engine
    save = writer.save

    def attempt(*arguments: Any, **options: Any) -> None:
        try:
            save(*arguments, **options)
        except Exception as error:
            errors.append(error)

    def raise_kept() -> None:
        if errors:
            raise errors[0]

    writer.save = attempt
    engine._copy_recovery_script = lambda folder: None  # DeepSpeed's own zero_to_fp32.py, unused
    try:
        yield raise_kept
    finally:
        del writer.save, engine._copy_recovery_script


def _time_collectives() -> None:
    """Counts DeepSpeed's collectives as communication, through its backend's methods.

    Those that it starts and waits for elsewhere (ZeRO 3's gathers of weights) show in what waits.
    """
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    for name in _COLLECTIVES:
        method = getattr(backend, name)
        if name not in vars(backend):  # of an engine before this one
            setattr(backend, name, _timed(method))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        with timing.part(timing.WAITING):
            return method(*arguments, **options)

    return timed


def _require_precision(config: EngineConfig) -> None:
    from deepspeed.accelerator import get_accelerator

    if config.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("engine.precision: this device has no fp16 arithmetic; use bf16, or fp32")


def _import_deepspeed() -> Any:
    """Imports DeepSpeed, ready for a machine without a GPU and without a compiler.

    On the CPU DeepSpeed would compile a shared-memory collective for half a minute, which leaves
    69 MB a rank in /dev/shm for ever and serves inference only.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 announces to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed import ops

    if not torch.cuda.is_available():
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    return deepspeed


def _import_muon_uncompiled() -> None:
    """Imports DeepSpeed's Muon, which `initialize` would, without torch's compiler behind it.

    Its kernels are decorated with `compile` at import, which loads the whole of inductor: 4 s and
    50 MB for an optimiser that is not offered here.
    """
    from deepspeed.runtime import compiler

    kept = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = kept
