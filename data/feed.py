"""The interface of the two modes of the training stream, indexed and in lanes, and its workers."""

import atexit
import signal
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch
from data.config import DataConfig
from data.errors import DataError

Position = dict[str, Any]


class Feed(Protocol):
    """A source of micro-batches with a position.

    Attributes:
        identity: JSON-able facts that decide the order and the content of the samples.
        num_samples: distinct samples; None where the number is unknown.
    """

    identity: dict[str, Any]
    num_samples: int | None

    def start(self) -> Position:
        """The position before the first step; JSON-able."""

    def steps_of(self, epochs: Sequence[int]) -> int | None:
        """Steps, from the first, that read every sample of each source so many times or more.

        None where the number of samples is unknown, or an epoch does not show all in one size.
        """

    def batches(self, position: Position) -> Iterator[tuple[Batch | DataError, Position | None]]:
        """Micro-batches of this rank from `position`, the start of a step, without end.

        Yields:
            A micro-batch, or the error that ends the run; and, where the micro-batch completes a
            step, the position after it, else None.
        """


def _as_is(item: Any) -> Any:
    return item


def _leave_requests(worker: int) -> None:
    """Requests to stop are for the process that has the workers: it ends them when it is done.

    A scheduler signals every process, and a worker that died of it would fail the run.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def load_in_workers(
    dataset: Dataset, config: DataConfig, sampler: Sampler[Any] | None = None
) -> Iterator[Any]:
    """Iterates over a dataset of whole batches in `config.workers` processes."""
    workers = config.workers
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            multiprocessing_context=config.worker_start if workers else None,
            worker_init_fn=_leave_requests,
            generator=torch.Generator(),  # by default it draws from the one of training
        )
    )
    if workers:
        # Before the handlers of torch and multiprocessing, which end workers by SIGTERM and wait.
        atexit.register(_end_workers, weakref.ref(batches))
    return batches


def _end_workers(batches: weakref.ref[Any]) -> None:
    """Ends the workers of an iterator that is still there when its process ends."""
    iterator = batches()
    if iterator is None:
        return
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():  # it reads from a source that does not answer
            worker.kill()
