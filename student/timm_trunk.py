"""The trunk of a student that is a network of timm: the maps of its levels, and its pooled vector.

`network` is timm's own module, so its weights are those of `timm.create_model(model,
num_classes=0)`. Where no teacher has a summary, what follows the student's level is left out.

Batch norms: in training they use the statistics of the micro-batch on their own rank, in evaluation
the running ones, which the engine averages over the ranks after each step and, like the weights,
over the steps. With activation checkpointing a block runs twice, but counts once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from student.errors import StudentError
from student.timm_config import TimmStudentConfig
from student.timm_network import build_network


class TimmTrunk(nn.Module):
    """Encodes images into the maps of some levels and the vector that timm pools.

    Args:
        config: the student's configuration.
        with_summary: whether a teacher has a summary; else there is no vector.

    Attributes:
        network: timm's, without classifier.
        map_index: number of the level whose map is the student's.
        num_layers: number of levels.
        frozen: whether batch norms use their running statistics in training too, for a trunk that
            is not trained.
    """

    def __init__(self, config: TimmStudentConfig, *, with_summary: bool) -> None:
        super().__init__()
        self.network: Any = build_network(config.model, config.drop_path)
        self.frozen = False
        self._with_summary = with_summary
        self.map_index, self._smallest = config.level_index, config.network.coarsest
        self._model = config.model
        if not with_summary:
            self.network.prune_intermediate_layers([self.map_index], prune_head=True)
            self._smallest = config.patch_size
        self.num_layers = len(config.network.levels) if with_summary else self.map_index + 1
        self._checkpointing = False
        self.activation_checkpointing = config.activation_checkpointing
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(_hold_statistics)
                module.register_forward_hook(_release_statistics)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass recomputes the activations of blocks."""
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enable: bool) -> None:
        if enable == self._checkpointing:
            return
        try:
            self.network.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise StudentError(
                f"student.activation_checkpointing: timm has none for {self._model!r} ({error})"
            ) from None
        self._checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of `network` that timm does not decay, such as positions."""
        named = getattr(self.network, "no_weight_decay", set)
        return set(named())

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a frozen trunk stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(
        self, images: Tensor, indices: Sequence[int] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Encodes images.

        Args:
            images: (B, 3, H, W), normalised.
            indices: of the levels; None for the student's own.

        Returns:
            The vector, (B, C), or None where no teacher has a summary or levels are asked for; and
            a map (B, C, h, w) of each of the levels, in their order.

        Raises:
            StudentError: the images are smaller than a cell of the coarsest level, or too small or
                few for the statistics of a batch.
        """
        if min(images.shape[2:]) < self._smallest:
            raise StudentError(
                f"images of {images.shape[2]} x {images.shape[3]} px: {self._model!r} has cells of "
                f"{self._smallest} px; both sides must be at least that"
            )
        chosen = [self.map_index] if indices is None else list(indices)
        with_vector = indices is None and self._with_summary
        options = {"indices": chosen, "norm": True, "output_fmt": "NCHW"}
        try:
            if not with_vector:
                return (
                    None,
                    *self.network.forward_intermediates(
                        images, intermediates_only=True, stop_early=True, **options
                    ),
                )
            final, maps = self.network.forward_intermediates(images, **options)
            return self.network.forward_head(final, pre_logits=True), *maps
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise StudentError(
                f"{self._model!r} has batch norms, and a micro-batch of {len(images)} images of "
                f"{images.shape[2]} x {images.shape[3]} px has one value of a channel to norm; "
                "take more images, run.micro_batch_size, or larger ones"
            ) from None


class _Kept(NamedTuple):
    momentum: float | None
    batches: Tensor | None


def _hold_statistics(norm: Any, _: Any) -> None:
    """In a pass that recomputes activations: the batch was counted in the first pass."""
    if norm.training and norm.track_running_stats and torch._C._current_graph_task_id() != -1:
        norm._kept = _Kept(norm.momentum, norm.num_batches_tracked)
        norm.momentum, norm.num_batches_tracked = 0.0, None


def _release_statistics(norm: Any, _: Any, __: Any) -> None:
    kept = norm.__dict__.pop("_kept", None)
    if kept is not None:
        norm.momentum, norm.num_batches_tracked = kept
