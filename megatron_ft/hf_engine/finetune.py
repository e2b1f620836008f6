"""Fine-tune any causal language model of transformers: one rank of `--engine transformers`.

    python -m megatron_ft.hf_engine.finetune --load MODEL_DIR --data-prefix data/commits \\
        --tokenizer-file MODEL_DIR --seq-length 2048 --train-iters 100 --save runs/first

starts a single rank; launch/finetune.py starts all ranks of a node or a SLURM job. Exit statuses
are those of megatron_ft.finetune.
"""

import os
import sys
import time
import warnings

from megatron_ft.finetune import rank_status, run_rank, silence_warnings
from megatron_ft.training import signals


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns its exit status. Raises UserError on rank 0; other ranks print it."""
    started = time.monotonic()
    signals.install()  # before torch is imported, which takes seconds
    return rank_status(lambda: _train(sys.argv[1:] if argv is None else argv, started))


def _train(argv: list[str], started: float) -> int:
    from megatron_ft.hf_engine.arguments import parse

    config = parse(argv, int(os.environ.get("WORLD_SIZE", 1)))
    silence_warnings()
    _silence_transformers()

    import torch.distributed as dist

    from megatron_ft.hf_engine.run import run
    from megatron_ft.training.device import select_device
    from megatron_ft.training.process_group import create_process_group

    device = select_device(config)
    create_process_group(config)
    status = run(config, device, started)
    dist.destroy_process_group()  # only after success: see run_rank
    return status


def _silence_transformers() -> None:
    """Hide what does not help users: progress bars of loading, and torch's warnings about the
    collectives and checkpoints that it uses itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers")


if __name__ == "__main__":
    run_rank(main)
