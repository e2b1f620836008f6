"""Megatron-FT: fine-tune StarCoder-family models with Megatron-Core on SLURM clusters."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ft.api import convert, finetune, load_model, open_dataset, plan, tokenize

__version__ = "0.1.0"
__all__ = ["convert", "finetune", "load_model", "open_dataset", "plan", "tokenize"]


def __getattr__(name: str) -> Any:
    """The functions of api.py, imported when they are first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_ft import api

    return getattr(api, name)
