"""Where nothing is compiled, torch's compiler is not imported: it takes a rank 4 s of CPU time.

Megatron-Core decorates functions by `torch.compile` when it is imported, and each of these calls
imports torch._dynamo and torch._inductor. So do torch's optimizers, when they are made and in their
steps, only to keep the compiler out.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

DYNAMO = "torch._dynamo"


@contextlib.contextmanager
def leave_functions_as_they_are() -> Iterator[None]:
    """Within it, `torch.compile` returns the function that it is given, and imports nothing."""

    def as_it_is(function: Callable | None = None, **options: Any) -> Callable:
        return function or as_it_is

    with mock.patch.object(torch, "compile", as_it_is):
        yield


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
