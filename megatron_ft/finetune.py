"""Fine-tune a StarCoder-family model: one rank of a training run.

    python -m megatron_ft.finetune --preset tiny --from-scratch --data-prefix data/commits --tokenizer-file tokenizer.json \\
        --seq-length 256 --train-iters 100 --global-batch-size 8 --save checkpoints

starts a single rank; launch/finetune.py starts all of a node, or of a SLURM job, with the environment variables of torchrun. The run resumes from
--save when it holds a checkpoint, else it starts from the weights of --load. It ends with status 0 when training is finished, 75 when it was
stopped after saving and the same command goes on, 2 for a user's mistake.
"""

import contextlib
import logging
import os
import sys
import time
import warnings

from megatron_ft.config.arguments import parse_args
from megatron_ft.engine import signals
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR, UserError, run_program


def main(argv: list[str] | None = None) -> int:
    """Run this rank; returns its exit status."""
    started = time.monotonic()
    signals.install()
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse_args(argv, int(os.environ.get("WORLD_SIZE", 1)))
        _silence_warnings()
        import torch

        from megatron_ft.engine import parallel
        from megatron_ft.engine.device import set_up_device
        from megatron_ft.engine.out_of_memory import out_of_memory

        device = set_up_device(config)
        parallel.initialize(config)
        try:
            from megatron_ft.run import run  # imports Megatron-Core, which set_up_device prepares for

            status = run(config, device, started)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(config, error, "before the first step") from error
        parallel.destroy()  # after a good end alone: see run_rank
        return status
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def run_rank() -> None:
    """Run `main` and end this process; after a failure at once, without taking process groups down.

    NCCL's teardown waits for peers, and these may wait in a collective that a failed rank never joins. So the first rank to fail
    is the first to end, and whoever started the ranks ends the others.
    """
    try:
        run_program(main)
    except SystemExit as end:
        if end.code in (None, EXIT_DONE, EXIT_RESUME):
            raise
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # torch's: it names the rank
        status = 1
    with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _silence_warnings() -> None:
    """Megatron-Core warns of each optional package that is missing and torch of the collectives it uses; neither helps a user."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


if __name__ == "__main__":
    run_rank()
