"""What a rank on the CPU never uses is not imported; it would take 5 s of CPU time before a step.

Megatron-Core decorates functions by `torch.compile` when it is imported, and each of these calls
imports torch's compiler, torch._dynamo and torch._inductor. So do torch's optimizers, when they are
made and in their steps, only to keep the compiler out. Megatron-Core also imports FSDP, distributed
tensors with sympy, setuptools and TensorBoard for features that this package does not use.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

DYNAMO = "torch._dynamo"
# What Megatron-Core can do without.
OPTIONAL = (
    *("megatron.core.distributed.fsdp.src.megatron_fsdp", "torch.distributed._tensor", "torch.distributed.fsdp"),
    "torch.utils.tensorboard",
)
# What it imports in any case, for FSDP's checkpoints and for allocators of GPU memory.
UNUSED = ("torch.distributed.checkpoint", "torch.utils.cpp_extension")


@contextlib.contextmanager
def leave_functions_as_they_are() -> Iterator[None]:
    """Within it, `torch.compile` returns the function that it is given, and imports nothing."""

    def as_it_is(function: Callable | None = None, **options: Any) -> Callable:
        return function or as_it_is

    with mock.patch.object(torch, "compile", as_it_is):
        yield


@contextlib.contextmanager
def leave_out_unused() -> Iterator[None]:
    """Within it, Megatron-Core 0.16 is imported without what it imports for unused features; what
    is imported already stays. Newer versions derive classes from what is UNUSED here."""
    try:
        found = version("megatron-core")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        found = "unknown"
    if not found.startswith("0.16."):
        yield
        return
    stand_ins: dict[str, Any] = dict.fromkeys(OPTIONAL)  # None is a module that is not installed
    stand_ins |= {name: _Unused(name) for name in UNUSED}
    added = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class _Unused(ModuleType):
    """A module whose content is only imported by name."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def replace_dynamo() -> None:
    """Let torch's optimizers and process groups find what they call of torch._dynamo without
    importing it. Changes nothing if it is imported already."""
    sys.modules.setdefault(DYNAMO, _Dynamo(DYNAMO))
    torch._dynamo = sys.modules[DYNAMO]  # as an import does


class _Dynamo(ModuleType):
    """What eager code calls of torch._dynamo; anything else imports the real module."""

    __file__ = None
    trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)  # called for each new process group

    @staticmethod
    def disable(function: Callable, recursive: bool = True, **options: Any) -> Callable:
        """The function itself: nothing is compiled."""
        return function

    @staticmethod
    def graph_break(message: str = "") -> None:
        """Nothing to do outside a compiled function."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(DYNAMO) is self:
            del sys.modules[DYNAMO]
        return getattr(importlib.import_module(DYNAMO), name)
