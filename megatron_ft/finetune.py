"""Fine-tune a StarCoder-family model: one rank of a training run.

    python -m megatron_ft.finetune --preset tiny --from-scratch --data-prefix data/commits \\
        --tokenizer-file tokenizer.json --seq-length 256 --train-iters 100 \\
        --global-batch-size 8 --save checkpoints

starts a single rank; launch/finetune.py starts all ranks of a node or a SLURM job, with torchrun's
environment variables. The run resumes from --save if it contains a checkpoint, else it starts from
the weights of --load. Exit status: 0 when training is finished, 75 when the run was stopped after
saving and the same command resumes it, 2 for a user error.
"""

import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR, UserError, run_program
from megatron_ft.training import signals


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns its exit status. Raises UserError on rank 0; other ranks print it."""
    started = time.monotonic()
    signals.install()  # before torch is imported, which takes seconds
    return rank_status(lambda: _train(sys.argv[1:] if argv is None else argv, started))


def _train(argv: list[str], started: float) -> int:
    config = parse_args(argv, int(os.environ.get("WORLD_SIZE", 1)))
    silence_warnings()
    gc.disable()  # what imports make stays: to look through it again and again takes a tenth of their time

    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device

    device = set_up_device(config)
    parallel.initialize(config)

    from megatron_ft.run import run  # imports Megatron-Core, which set_up_device prepares for

    gc.freeze()
    gc.enable()
    status = run(config, device, started)
    parallel.destroy()  # only after success: see run_rank
    return status


def rank_status(train: Callable[[], int]) -> int:
    """The exit status of this rank, which `train` returns; a UserError is raised only on rank 0,
    and printed on the others."""
    try:
        return train()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run_rank(main: Callable[[], int] = main) -> None:
    """Run `main` and end this process; after a failure at once, without destroying process groups.

    NCCL's teardown waits for peers, which may wait in a collective that a failed rank never joins.
    So the first rank to fail is the first to exit, and the launcher ends the others.
    """
    try:
        run_program(main)
    except SystemExit as end:
        if end.code in (None, EXIT_DONE, EXIT_RESUME):
            raise
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's: it names the rank
        status = 1
    with contextlib.suppress(OSError, ValueError):  # a pipe without a reader
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def silence_warnings() -> None:
    """Hide torch's warnings about the collectives it uses, which do not help users."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


if __name__ == "__main__":
    run_rank()
