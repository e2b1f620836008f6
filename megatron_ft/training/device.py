"""The device of a rank."""

import os
import platform
import re
from pathlib import Path

import torch

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError

NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 and, the last, ARM; as Linux names them


def select_device(config: Config | None = None) -> torch.device:
    """Select and return this rank's device: the GPU of LOCAL_RANK, else the CPU; safe to repeat.

    Raises UserError if no GPU is left for this rank, or if the launcher found GPUs
    (MEGATRON_FT_GPUS) that torch cannot use.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_gpu(config))
        torch.cuda.set_device(device)
        return device
    if int(os.environ.get("MEGATRON_FT_GPUS") or 0):
        raise UserError(_no_cuda())
    return torch.device("cpu")


def slow_bf16(config: Config, device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """A warning if --bf16 runs on a CPU that computes it in software, as most do.

    `cpuinfo` is Linux's list of processors; nothing is known of other systems.
    """
    if not config.precision.bf16 or device.type != "cpu" or not cpuinfo.is_file():
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text("utf-8", "replace"), re.MULTILINE)
    if flags is None or NATIVE_BF16 & set(flags[1].split()):
        return []
    return ["warning: this CPU has no native bfloat16, so --bf16 is up to 100 times slower; add --no-bf16"]


def _own_gpu(config: Config | None) -> int:
    """Index of this rank's GPU among the visible ones: LOCAL_RANK, or 0 if only one is visible."""
    gpus, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus == 1:  # SLURM may bind one GPU to each task
        if config is not None and ranks > 1:
            config.notices.append(
                f"warning: each of this node's {ranks} ranks sees one GPU, so NCCL cannot copy directly between GPUs "
                "and is slower or fails; make all visible (SLURM: --gpus-per-node, without --gpus-per-task and --gpu-bind)"
            )
        return 0
    if rank >= gpus:
        raise UserError(
            f"local rank {rank} of {ranks} on {platform.node()} has no GPU: {gpus} are visible, one per rank; "
            f"start at most {gpus} ranks per node (--num-processes {gpus}, or sbatch --ntasks-per-node={gpus})"
        )
    return rank


def _no_cuda() -> str:
    if torch.version.cuda or torch.version.hip:
        cause = f"the driver is too old for CUDA {torch.version.cuda}" if torch.version.cuda else "the driver fails"
        cause += ", or a container hides the GPUs (apptainer --nv), or nvidia-smi fails as well"
    else:
        cause = "it was built without CUDA, install a build with it (https://pytorch.org/get-started/locally)"
    return (
        f"{platform.node()} has GPUs for this run, but torch {torch.__version__} cannot use one: {cause}; "
        "to train on the CPU, set CUDA_VISIBLE_DEVICES= before the command, or GPUS_PER_NODE=0 in a SLURM job"
    )
