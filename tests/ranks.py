"""Real process groups for tests: `run_ranks(function, world_size, *args)` on gloo ranks.

Ranks are forked from a server that has imported torch and Megatron-Core already, so they start
fast. The function must be importable (module level), its arguments and result picklable.
"""

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "numpy",
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def free_port() -> int:
    """An unused port below the ephemeral range (32768 and up), so that no outgoing connection takes
    it first."""
    while True:
        with socket.socket() as s:
            port = random.SystemRandom().randrange(20000, 32000)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _rank_main(connection, function, rank, world_size, port, env, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        **env,
    )
    try:
        import torch

        torch.set_num_threads(1)
        connection.send((True, function(*args)))
    except BaseException:  # the parent raises it
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)  # no atexit hang on a process group whose peer failed


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300, env: dict[str, str] | None = None
) -> list:
    """Run `function(*args)` on `world_size` processes with torchrun's environment variables.

    Returns their results in rank order.
    """
    port = free_port()
    ranks = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank_main, args=(theirs, function, rank, world_size, port, env or {}, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            pending = [c for rank, (_, c) in enumerate(ranks) if rank not in results]
            ready = wait(pending, timeout)
            if not ready:
                raise TimeoutError(
                    f"ranks {sorted(set(range(world_size)) - set(results))} did not finish in {timeout} s"
                )
            for rank, (_, connection) in enumerate(ranks):
                if connection in ready:
                    try:
                        ok, value = connection.recv()
                    except EOFError:
                        ok, value = False, "the process died"
                    if not ok:
                        raise RuntimeError(f"rank {rank} failed:\n{value}")
                    results[rank] = value
    finally:
        for process, _ in ranks:
            process.join(2)
            process.kill()
    return [results[rank] for rank in range(world_size)]
