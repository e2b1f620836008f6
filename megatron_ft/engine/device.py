"""The device a rank computes on; without a GPU, the adapter that lets Megatron-Core run on the CPU.

Megatron-Core asks for CUDA by name in some forty places: tensors made on `"cuda"`, streams, the CUDA random state, asserts on
`torch.cuda.FloatTensor`. `set_up_device` enters a mode that answers these from the CPU. It does nothing where a GPU is
present. Beside it only `optimizer.py` exchanges a function of another package: the sum of gradients' norms.
"""

import contextlib
import logging
import os
import platform

import torch
from torch.overrides import TorchFunctionMode

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError

_entered: "CpuForCuda | None" = None


def set_up_device(config: Config | None = None) -> torch.device:
    """Choose this rank's device (LOCAL_RANK's GPU, else the CPU through the adapter) and return it. Safe to call again.

    Raises UserError where this rank has no GPU of its own, and where the launcher counted GPUs (MEGATRON_FT_GPUS) that torch cannot use.
    """
    global _entered
    if config is not None and config.parallel.tensor > 1:
        # One hardware queue: tensor-parallel communication is then issued in the order that lets it overlap with computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_gpu(config))
        torch.cuda.set_device(device)
        return device
    if int(os.environ.get("MEGATRON_FT_GPUS") or 0):
        raise UserError(_no_cuda())
    if _entered is None:
        _patch_cuda_functions()
        _entered = CpuForCuda()
        _entered.__enter__()
    return torch.device("cpu")


def _own_gpu(config: Config | None) -> int:
    """Number of this rank's GPU among those it sees: LOCAL_RANK's, or the only one."""
    gpus, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus == 1:  # a site may show each task its own
        if config is not None and ranks > 1:
            config.notices.append(
                f"warning: each of this node's {ranks} ranks sees one GPU alone, so NCCL cannot copy between them directly "
                "and is slower, or fails; let each see all (SLURM: --gpus-per-node, without --gpus-per-task and --gpu-bind)"
            )
        return 0
    if rank >= gpus:
        raise UserError(
            f"local rank {rank} of {ranks} on {platform.node()} has no GPU of its own: {gpus} are visible, and each takes one rank; "
            f"start at most {gpus} a node (--num-processes {gpus}, or sbatch --ntasks-per-node={gpus})"
        )
    return rank


def _no_cuda() -> str:
    if torch.version.cuda or torch.version.hip:
        cause = (
            f"its driver is older than CUDA {torch.version.cuda} wants" if torch.version.cuda else "its driver fails"
        )
        cause += ", or a container hides it (apptainer --nv), or nvidia-smi fails there, too"
    else:
        cause = "that torch is built without CUDA, install one with it (https://pytorch.org/get-started/locally)"
    return (
        f"{platform.node()} has GPUs for this run, but torch {torch.__version__} cannot use one: {cause}; "
        "to train on the CPU, type CUDA_VISIBLE_DEVICES= before the command, in a SLURM job GPUS_PER_NODE=0"
    )


class CpuForCuda(TorchFunctionMode):
    """Sends what is asked of CUDA to the CPU: factory functions, `.to`, `.cuda()`, and the type names that asserts compare."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _NoStream:
    """Stands for a CUDA stream or event: the CPU does everything in order already."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> "_NoStream":
        return self

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _patch_cuda_functions() -> None:
    """Device, stream and random-state functions of torch.cuda, answered for the CPU; no compiled fusions, which want a compiler."""
    import megatron.core.jit

    megatron.core.jit.disable_jit_fuser()
    cpu = torch.device("cpu")
    nothing = contextlib.nullcontext
    generator = torch.default_generator
    for name, function in {
        "current_device": lambda: cpu,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "stream": lambda stream: nothing(),
        "Stream": _NoStream,
        "Event": _NoStream,
        "manual_seed": generator.manual_seed,
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
    }.items():
        setattr(torch.cuda, name, function)

    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: generator.get_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    random._lazy_call = lambda call: call()
    # Here the two generators are one, so this warning of Megatron's random-state tracker is always and rightly given.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
