"""The error of a run that exceeds GPU memory, with the flags that save memory."""

import os

import torch

from megatron_ft.config.config import Config
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
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    more, micro_batch = 2 * tensor, config.training.micro_batch_size
    # A divisor of the micro-batch size divides the global batch size, too.
    fewer = max((n for n in range(1, micro_batch) if micro_batch % n == 0), default=micro_batch)
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    assert config.shape is not None
    splits = not (
        config.shape.num_attention_heads % more or config.parallel.world_size % (more * pipeline) or on_node % more
    )
    steps = {
        f"--micro-batch-size {fewer}": micro_batch > 1,
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
