"""Process groups and seeds of tensor, pipeline and data-parallel ranks."""

import math
import os

import torch
import torch.distributed as dist

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.training.process_group import create_process_group
from megatron_ft.training.seeds import step_seed


def initialize(config: Config) -> None:
    """Create the default process group and Megatron's groups, and seed a random start.

    Call `set_up_device` first. Raises UserError if the ranks cannot be divided into groups.
    """
    from megatron.core import parallel_state

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    model_parallel = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    if world_size % model_parallel:
        raise UserError(
            f"{world_size} processes cannot be divided into --tensor-model-parallel-size {config.parallel.tensor} x "
            f"--pipeline-model-parallel-size {config.parallel.pipeline} x --context-parallel-size "
            f"{config.parallel.context}; start a multiple of {model_parallel}"
        )
    create_process_group(config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        distributed_timeout_minutes=max(1, math.ceil(config.parallel.timeout_minutes)),
    )
    seed_start(config.training.seed)


def destroy() -> None:
    """Destroy all groups and globals that `initialize` created."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_start(seed: int) -> None:
    """Seed a random start: equal on data-parallel ranks, different on pipeline stages and, inside
    sharded layers, on tensor-parallel ranks."""
    _seed(seed + 100 * pipeline_parallel_rank())


def seed_step(seed: int, iteration: int) -> None:
    """Seed one training step, as a function of only the iteration and the rank."""
    replica = pipeline_parallel_rank() * data_parallel_size() + data_parallel_rank()
    _seed(step_seed(seed, iteration, replica))


def _seed(seed: int) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def data_parallel_size() -> int:
    """Number of data-parallel ranks."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def data_parallel_rank() -> int:
    """Index of this rank among the data-parallel ranks."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def pipeline_parallel_rank() -> int:
    """This rank's pipeline stage, from 0."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def counts_here() -> bool:
    """Whether this rank's numbers count for its model-parallel group: it is the first
    tensor-parallel rank of the last pipeline stage."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
