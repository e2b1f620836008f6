"""What the launcher starts: the training program with flags that were checked, on so many ranks."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.config.arguments import parse_args
from megatron_ft.config.config import Config
from megatron_ft.config.flag import TRANSFORMERS
from megatron_ft.errors import UserError
from megatron_ft.launcher import mtf
from megatron_ft.launcher.command import model_parallel_size, training_command
from megatron_ft.metrics.sinks import check_sinks


@dataclass(frozen=True)
class Training:
    """The training program to start: its checked flags and the command line of one rank.

    `stop_signal` is the only signal at which the engine saves, None if any stop signal will do.
    """

    config: Config
    command: list[str]
    stop_signal: signal.Signals | None = None

    @property
    def logs(self) -> Path | None:
        """Where ranks above 0 write their logs."""
        return Path(self.config.checkpoint.save) / "logs" if self.config.checkpoint.save else None


def check_training(engine: str, flags: Sequence[str], num_processes: int) -> Training:
    """Parse and check the training program's flags. Raises UserError."""
    if engine == "mtf":
        checkout = mtf.megatron_path()
        common, branch_only = mtf.split_branch_only(flags, mtf.branch_flags(checkout))
        config = parse_args(common, world_size=num_processes)
        return Training(config, mtf.mtf_command(config, common, branch_only, checkout), mtf.STOP_SIGNAL)
    module = "megatron_ft.finetune"
    if engine == TRANSFORMERS:
        from megatron_ft.hf_engine.arguments import parse  # numpy among others

        config, module = parse(flags, num_processes), "megatron_ft.hf_engine.finetune"
    else:
        config = parse_args(flags, world_size=num_processes)
    if not os.environ.get("CONTAINER_COMMAND"):  # else its packages are others than ours
        check_sinks(config)
    return Training(config, training_command(flags, module))


def local_processes(given: int | None, gpus: int, flags: Sequence[str]) -> int:
    """How many ranks to start on this machine, which has `gpus` GPUs: `given`, or one per GPU, or
    as few as the layout in `flags` takes. Raises UserError."""
    number = (gpus or model_parallel_size(flags)) if given is None else given
    if number < 1:
        raise UserError(f"--num-processes {number}: must be at least 1")
    return number


def check_gpus(num_processes: int, gpus: int) -> None:
    """Raise UserError if there are GPUs, but not one for each rank."""
    if 0 < gpus < num_processes:
        raise UserError(
            f"--num-processes {num_processes}: there are {gpus} GPUs, and each takes one process; give at most {gpus}, "
            "or type CUDA_VISIBLE_DEVICES= before the command to train on the CPU"
        )
