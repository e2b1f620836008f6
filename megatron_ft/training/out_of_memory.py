"""The error of a run that exceeds GPU memory, with the flags that save memory."""

import os

import torch

from megatron_ft.config.config import Config
from megatron_ft.config.flag import TRANSFORMERS
from megatron_ft.errors import UserError
from megatron_ft.model.cost import GIB


def out_of_memory(config: Config, error: torch.OutOfMemoryError, when: str) -> UserError:
    """The error to raise instead of torch's `error`; `when` is like "after 12 iterations"."""
    asked = next((part for part in str(error).split(". ") if part.startswith("Tried to allocate")), "")
    facts = [when, *([asked[0].lower() + asked[1:]] if asked else []), *_gpu_memory()]
    return UserError(
        f"out of GPU memory ({', '.join(facts)}); "
        f"next: {', or '.join(remedies(config)) or 'a smaller model, or GPUs with more memory'}; launch/plan.py shows what fits"
    )


def remedies(config: Config) -> list[str]:
    """Flags that are not used yet and save memory, ordered by their cost in speed."""
    return _for_transformers(config) if config.engine == TRANSFORMERS else _for_megatron(config)


def _for_transformers(config: Config) -> list[str]:
    several, lora = config.parallel.world_size > 1, config.lora
    steps = {
        f"--micro-batch-size {fewer_sequences(config)}": config.training.micro_batch_size > 1,
        "--use-distributed-optimizer to shard the model": several and not config.parallel.distributed_optimizer,
        "--recompute-granularity full": config.memory.recompute_granularity != "full",
        "--lora-rank 16 to train only adapters": not lora.rank,
        "--quantize-base nf4": bool(lora.rank and not lora.quantize_base),
    }
    return [flag for flag, helps in steps.items() if helps]


def fewer_sequences(config: Config) -> int:
    """The next smaller micro-batch size; a divisor, so that it divides the global batch, too."""
    size = config.training.micro_batch_size
    return max((n for n in range(1, size) if size % n == 0), default=size)


def _for_megatron(config: Config) -> list[str]:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    more = 2 * tensor
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    assert config.shape is not None
    splits = not (
        config.shape.num_attention_heads % more or config.parallel.world_size % (more * pipeline) or on_node % more
    )
    steps = {
        f"--micro-batch-size {fewer_sequences(config)}": config.training.micro_batch_size > 1,
        "--sequence-parallel": tensor > 1 and not config.parallel.sequence,
        "--recompute-granularity full": config.memory.recompute_granularity != "full",
        f"--tensor-model-parallel-size {more}": splits,
        "--lora-rank 16 to train only adapters": not config.lora.rank,
    }
    return [flag for flag, helps in steps.items() if helps]


def _gpu_memory() -> list[str]:
    if not torch.cuda.is_available():
        return []
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory
    return [f"peak {peak / GIB:.1f} of {total / GIB:.1f} GiB on {torch.cuda.get_device_name()}"]
