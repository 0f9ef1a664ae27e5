"""Runs a function on several CPU ranks: processes of one fork server that has torch loaded."""

import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import CONTEXT


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300
) -> list[Any]:
    """The results of `function(*arguments)` on every rank, in their order."""
    queue = CONTEXT.Queue()
    folder = tempfile.mkdtemp()
    processes = [
        CONTEXT.Process(target=_main, args=(rank, world_size, folder, queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = [pickle.loads(queue.get(timeout=timeout_s)) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
        shutil.rmtree(folder)
    failures = [trace for _, _, trace in answers if trace]
    assert not failures, "\n".join(failures)
    return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]


def _main(
    rank: int, world: int, folder: str, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
    )
    import torch

    from distill.runtime import distributed

    torch.set_num_threads(1)
    try:
        distributed.connect(60, Path(folder))
        answer = (rank, function(*arguments), "")
        distributed.disconnect(Path(folder))
    except BaseException:
        answer = (rank, None, traceback.format_exc())
    # As bytes: a tensor's shared memory would be gone with this process.
    queue.put(pickle.dumps(answer))
