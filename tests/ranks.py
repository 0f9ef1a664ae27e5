"""Runs a function on several CPU ranks: processes of one fork server that has torch loaded."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "deepspeed", "distill.engine", "student.model"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120
) -> list[Any]:
    """The results of `function(*arguments)` on every rank, in their order."""
    queue = _CONTEXT.Queue()
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_main, args=(rank, world_size, port, queue, function, arguments))
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
    failures = [trace for _, _, trace in answers if trace]
    assert not failures, "\n".join(failures)
    return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]


def _main(
    rank: int, world: int, port: int, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from distill import distributed

    torch.set_num_threads(1)
    try:
        distributed.connect(timeout_s=60)
        answer = (rank, function(*arguments), "")
        distributed.disconnect()
    except BaseException:
        answer = (rank, None, traceback.format_exc())
    # As bytes: a tensor's shared memory would be gone with this process.
    queue.put(pickle.dumps(answer))
