"""The device of a rank; without a GPU, an adapter that lets Megatron-Core run on the CPU.

Megatron-Core refers to CUDA by name some forty times: tensors on `"cuda"`, streams, the CUDA random
state, asserts on `torch.cuda.FloatTensor`. Without a GPU, `set_up_device` redirects these to the
CPU. The only other patch of another package is the gradient norm in optimizer.py.
"""

import contextlib
import logging
import os
import warnings

import torch
from torch.overrides import TorchFunctionMode

from megatron_ft.config.config import Config
from megatron_ft.engine.unused_imports import leave_functions_as_they_are, leave_out_unused, replace_dynamo
from megatron_ft.training.device import select_device

_entered: "CpuForCuda | None" = None


def set_up_device(config: Config | None = None) -> torch.device:
    """Select and return this rank's device (`select_device`), and let Megatron-Core run on it; safe
    to repeat. Raises UserError."""
    global _entered
    if config is not None and config.parallel.tensor > 1:
        # One hardware queue keeps the order in which tensor-parallel communication overlaps with
        # computation.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = select_device(config)
    _silence_megatron_core()
    if device.type == "cpu" and _entered is None:
        _patch_cuda_functions()
        _entered = CpuForCuda()
        _entered.__enter__()
    return device


def _silence_megatron_core() -> None:
    """Hide what it warns of and does not help users: optional packages, and from 0.19 on that
    GPTModel gets no new features."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


class CpuForCuda(TorchFunctionMode):
    """Redirects torch calls from CUDA to the CPU: factory functions, `.to`, `.cuda()`, and
    `.type()`, whose result Megatron-Core's asserts compare."""

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
    """Replaces a CUDA stream or event; the CPU executes in order anyway."""

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
    """Replace the device, stream and random-state functions of torch.cuda, and disable compiled
    fusions, which need a C++ compiler."""
    replace_dynamo()
    with leave_functions_as_they_are(), leave_out_unused():
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
    # The CPU and the "CUDA" generator are one, so the random-state tracker would always warn.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
