"""A non-finite loss or gradient norm: which sequences, documents and files it came from."""

import json
import math
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_ft.errors import UserError
from megatron_ft.training.batches import BatchReader, MicroBatch
from megatron_ft.training.run import Run


def end_nonfinite(
    run: Run, what: str, reader: BatchReader, micro_batches: list[MicroBatch], losses: list[float]
) -> NoReturn:
    """End a run without saving; what led to the non-finite loss or gradient norm is written to a
    file. A collective call."""
    iteration = run.state.iteration + 1
    path = Path(run.config.checkpoint.save or ".") / f"nonfinite_loss_iteration_{iteration:07d}.json"
    culprits = _nonfinite(run, reader, micro_batches, losses)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "iteration": iteration,
            "consumed_samples": run.state.consumed_samples,
            "what": what,
            "micro_batches": culprits,
        }
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    found = f"{what} at iteration {iteration}; its sequences and documents are in {path}"
    run.log.event(found)
    run.log.close()
    raise UserError(
        f"{found}, and the newest checkpoint is from before it: "
        "lower --lr, remove those documents, or use --bf16 instead of --fp16"
    )


def _nonfinite(run: Run, reader: BatchReader, micro_batches: list[MicroBatch], losses: list[float]) -> list[dict]:
    """The micro-batches of all ranks with a non-finite loss.

    `losses` are those of this rank's `micro_batches`, empty except on the last pipeline stage.
    """
    ours = [
        {
            "data_parallel_rank": run.engine.data_parallel_rank,
            "micro_batch": number,
            "rows": [{"sample": i, **reader.dataset.provenance(i)} for i in micro.samples],
        }
        for number, (micro, loss) in enumerate(zip(micro_batches, losses, strict=False))
        if run.engine.counts and not math.isfinite(loss)
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    return [entry for entries in everyone for entry in entries]
