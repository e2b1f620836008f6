"""Process groups of a run: tensor, pipeline and data parallel ranks from torchrun's environment variables, and their seeds."""

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError


def initialize(config: Config) -> None:
    """Make the default group and Megatron's groups from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (without them: one rank),
    and the seeds of a random start. Call `set_up_device` first."""
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    model_parallel = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    if world_size % model_parallel:
        raise UserError(
            f"{world_size} processes cannot hold --tensor-model-parallel-size {config.parallel.tensor} x "
            f"--pipeline-model-parallel-size {config.parallel.pipeline} x --context-parallel-size "
            f"{config.parallel.context}; start a multiple of {model_parallel}"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        alone = {} if "MASTER_ADDR" in os.environ else {"store": dist.HashStore()}
        minutes = timedelta(minutes=config.parallel.timeout_minutes)
        dist.init_process_group(backend, timeout=minutes, rank=rank, world_size=world_size, **alone)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        distributed_timeout_minutes=max(1, math.ceil(config.parallel.timeout_minutes)),
    )
    seed_start(config.training.seed)


def destroy() -> None:
    """Take down every group and global that `initialize` made."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_start(seed: int) -> None:
    """Seeds of a random start: equal on data-parallel ranks, different on pipeline stages and (inside sharded layers) tensor ranks."""
    _seed(seed + 100 * pipeline_parallel_rank())


def seed_step(seed: int, iteration: int) -> None:
    """Seeds of one training step, a function of the iteration and the rank's place alone.

    Dropout so needs no saved random state: a resumed run draws what the unbroken one would have drawn.
    """
    place = pipeline_parallel_rank() * data_parallel_size() + data_parallel_rank()
    _seed((seed + 1_000_003 * (iteration + 1) + 10_007 * place) % 2**31)


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def data_parallel_size() -> int:
    """Number of data-parallel ranks."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def data_parallel_rank() -> int:
    """This rank's number among the data-parallel ranks."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def pipeline_parallel_rank() -> int:
    """This rank's pipeline stage, from 0."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def counts_here() -> bool:
    """Whether this rank speaks for its pipeline and tensor-parallel copies: the first tensor-parallel rank of the last stage."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def sum_over_data_parallel(values: list[float]) -> list[float]:
    """Sums over data-parallel ranks, in float64; all ranks get the same numbers when each counted its own rows."""
    from megatron.core import parallel_state

    return _sum(values, parallel_state.get_data_parallel_group())


def sum_over_all(values: list[float]) -> list[float]:
    """Sums over all ranks, in float64. What copies would count more than once, `counts_here` ranks alone should give."""
    return _sum(values, None)


def _sum(values: list[float], group) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device="cuda")
    dist.all_reduce(total, group=group)
    return total.tolist()
