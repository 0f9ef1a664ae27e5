"""Worker processes of the training stream, by torch's DataLoader."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.config import DataConfig


def _as_is(item: Any) -> Any:
    return item


def load_in_workers(
    dataset: Dataset, config: DataConfig, sampler: Sampler[Any] | None = None
) -> Iterator[Any]:
    """Iterates over a dataset of whole batches in `config.workers` processes."""
    workers = config.workers
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            multiprocessing_context=config.worker_start if workers else None,
            generator=torch.Generator(),  # by default it draws from the one of training
        )
    )
