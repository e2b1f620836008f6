"""The training program's command line and environment, the same for local ranks and for SLURM."""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# The folders of programs: of the checkout, or those that an installed package has with it.
PROGRAMS = ROOT / "megatron_ft/programs" if (ROOT / "megatron_ft/programs").is_dir() else ROOT
NVIDIA_SMI_SECONDS = 60  # without its persistence daemon, the driver takes seconds per GPU to load


def training_command(flags: Sequence[str], module: str = "megatron_ft.finetune") -> list[str]:
    """Command line of one rank of an engine whose program is `module`."""
    return [*training_python(), "-m", module, *flags]


def training_python() -> list[str]:
    """Command line of the Python that trains: in the container if cluster.env names one.

    -P: a file called tokenize.py in the working directory must not hide Python's own.
    """
    container = shlex.split(os.environ.get("CONTAINER_COMMAND", ""))
    python = (os.environ.get("CONTAINER_PYTHON") or "python") if container else sys.executable
    return [*container, python, "-P"]


def shared_environment(ranks_on_node: int, gpus: int) -> dict[str, str]:
    """Variables that all ranks have in common; those that the user or the site has set are kept.

    With `gpus` (per node) above 0, ranks must not fall back to the CPU.
    """
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks_on_node)),
        # tensor parallelism needs it to overlap communication on GPUs before Blackwell
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",  # logs are followed with tail -f
        "PYTHONUTF8": "1",  # srun may start ranks with LANG=C; logs are UTF-8 everywhere
        "PYTHON_COLORS": "0",  # srun -u gives ranks a terminal, and Python 3.13 colors tracebacks on one
    }
    checkout = [str(ROOT)] if PROGRAMS == ROOT else []  # an installed package is found without it
    path = os.pathsep.join(filter(None, [*checkout, os.environ.get("PYTHONPATH")]))
    return {
        **{name: os.environ.get(name, value) for name, value in defaults.items()},
        "PYTHONPATH": path,
        "MEGATRON_FT_GPUS": str(gpus),  # read by engine/device.py
    }


def rank_environment(rank: int, world_size: int, local_rank: int, ranks_on_node: int) -> dict[str, str]:
    """The variables that identify a rank, under torchrun's names."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_on_node),
    }


def model_parallel_size(flags: Sequence[str]) -> int:
    """TP x PP x CP of a command line: the fewest processes that can hold the model."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=int, default=1)
    try:
        sizes = parser.parse_known_args(list(flags))[0]
    except argparse.ArgumentError:
        return 1  # the full parser reports the error
    tensor, pipeline, context = (max(1, getattr(sizes, name)) for name in names)
    return tensor * pipeline * context


def local_gpus() -> int:
    """GPUs of this machine that a process may use, found without importing torch (seconds)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=NVIDIA_SMI_SECONDS)
    except OSError:  # left by a driver that was removed
        return 0
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi -L has not answered in {NVIDIA_SMI_SECONDS} s: a GPU or its driver hangs; repair or restart this "
            "machine, or type CUDA_VISIBLE_DEVICES= before the command to train on the CPU"
        ) from None
    return sum(line.startswith(b"GPU ") for line in listed.stdout.splitlines())


def free_port(first: int) -> int:
    """The first port from `first` on that nothing on this machine is bound to. Raises OSError.

    Choose `first` below the ephemeral range (32768 and up), so that no outgoing connection takes
    the port before a rank listens on it.
    """
    for port in range(first, first + 1000):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port among the 1000 from {first}")


def as_shell(environment: Mapping[str, str], command: Sequence[str]) -> str:
    """The environment and the command as text that can be pasted into a shell."""
    return " \\\n  ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)]
    )
