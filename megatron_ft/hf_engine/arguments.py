"""The command line of `--engine transformers`, and what is checked before anything is loaded.

No torch here: the launcher checks a command line on a login node in a second.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron_ft.config.arguments import parse_args
from megatron_ft.config.config import Config
from megatron_ft.config.flag import TRANSFORMERS
from megatron_ft.errors import UserError
from megatron_ft.hf_engine.start import find_start
from megatron_ft.weights.directory import list_iterations

EXTRA = "transformers"  # of setup.py


def parse(argv: Sequence[str], world_size: int = 1) -> Config:
    """Parse and validate a command line for `world_size` processes. Raises UserError."""
    config = parse_args(argv, world_size, TRANSFORMERS)
    check_flags(config)
    check_packages(config)
    check_start(config)
    return config


def check_flags(config: Config) -> None:
    """Raise UserError for values that this engine does not have, and for contradictions."""
    if config.memory.recompute_granularity == "selective":
        raise UserError(
            "--recompute-granularity selective: --engine transformers recomputes entire layers; give full, or leave it out"
        )
    if config.memory.transformer_impl == "transformer_engine":
        raise UserError(
            "--transformer-impl transformer_engine: --engine transformers has transformers' layers, with Liger's kernels "
            "where they are installed (auto) or without (local)"
        )
    if config.data.reset_attention_mask and not config.data.reset_position_ids:
        raise UserError(
            "--no-reset-position-ids: --engine transformers tells documents apart by their positions; "
            "leave it out, or add --no-reset-attention-mask"
        )
    lora = config.lora
    for flag, given in (("--lora-dora", lora.dora), ("--quantize-base", lora.quantize_base)):
        if given and not lora.rank:
            raise UserError(f"{flag} needs adapters to train; add --lora-rank 16")


def check_packages(config: Config) -> None:
    """Raise UserError for the first package that the flags need and that is not installed."""
    needed = ["accelerate"]
    if config.lora.rank:
        needed.append("peft")
    if config.lora.quantize_base:
        needed.append("bitsandbytes")
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install -e '.[{EXTRA}]' installs it")


def check_start(config: Config) -> None:
    """Raise UserError unless there is a checkpoint to resume or a model to start from."""
    checkpoint = config.checkpoint
    if checkpoint.save and list_iterations(Path(checkpoint.save)):
        return
    if checkpoint.load:
        find_start(checkpoint.load, checkpoint.load_iteration, adapters=bool(config.lora.rank))
    else:
        empty = f"--save {checkpoint.save} contains no checkpoint" if checkpoint.save else "no --save"
        raise UserError(f"{empty}, and --load is missing; give --load DIR")
