"""A non-finite loss or gradient norm: which sequences, documents and files it came from."""

import json
import math
from pathlib import Path

import torch.distributed as dist

from megatron_ft.engine import parallel
from megatron_ft.engine.batches import BatchReader, MicroBatch


def write_provenance(
    directory: Path,
    what: str,
    *,
    iteration: int,
    consumed_samples: int,
    reader: BatchReader,
    micro_batches: list[MicroBatch],
    losses: list[float],
) -> Path:
    """Write nonfinite_loss_iteration_*.json on rank 0 and return its path; a collective call.

    It lists the micro-batches of all ranks with a non-finite loss. `losses` are those of this
    rank's `micro_batches`, empty except on the last pipeline stage; `iteration` counts from 1;
    `consumed_samples` are those before the step.
    """
    ours = [
        {
            "data_parallel_rank": parallel.data_parallel_rank(),
            "micro_batch": number,
            "rows": [{"sample": i, **reader.dataset.provenance(i)} for i in micro.samples],
        }
        for number, (micro, loss) in enumerate(zip(micro_batches, losses, strict=False))
        if parallel.counts_here() and not math.isfinite(loss)
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    path = directory / f"nonfinite_loss_iteration_{iteration:07d}.json"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "what": what,
            "micro_batches": [entry for entries in everyone for entry in entries],
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
