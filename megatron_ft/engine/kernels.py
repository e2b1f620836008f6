"""Which kernels a run uses on its GPU: Transformer Engine's layers or the local ones, and fused
accumulation of weight gradients.

Transformer Engine's layers are faster only where it has an attention kernel for packed rows. Its
conditions here are those of versions 2.9 to 2.11, read in its `get_attention_backend` and
`nvte_get_fused_attn_backend`.
"""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError

# The first with grouped and multi-query attention over packed rows, from Hopper on.
CUDNN_FOR_PACKED_ROWS = 90600


@dataclass(frozen=True)
class Installed:
    """What the choice depends on: versions of packages (None: not installed), and the GPU's compute
    capability (None: no GPU). `cudnn` is torch's number, 90600 for 9.6.0."""

    transformer_engine: str | None = None
    flash_attention_2: bool = False
    flash_attention_3: bool = False
    cudnn: int = 0
    capability: tuple[int, int] | None = None

    @classmethod
    def here(cls) -> "Installed":
        """This process's packages and GPU; NVTE_FLASH_ATTN=0 and NVTE_FUSED_ATTN=0 count."""
        flash = os.environ.get("NVTE_FLASH_ATTN") != "0"
        fused = os.environ.get("NVTE_FUSED_ATTN") != "0"
        gpu = torch.cuda.is_available()
        return cls(
            transformer_engine=_version("transformer-engine") if _importable() else None,
            flash_attention_2=flash and _version("flash-attn") is not None,
            flash_attention_3=flash and _version("flash-attn-3") is not None,
            cudnn=torch.backends.cudnn.version() or 0 if gpu and fused else 0,
            capability=torch.cuda.get_device_capability() if gpu else None,
        )


def uses_transformer_engine(config: Config, installed: Installed | None = None) -> bool:
    """Whether layers are Transformer Engine's.

    Raises UserError if --transformer-impl asks for it where it cannot be used.
    """
    wanted = config.memory.transformer_impl
    if wanted == "local":
        return False
    reason = why_not_transformer_engine(config, installed or Installed.here())
    if reason and wanted == "transformer_engine":
        raise UserError(f"--transformer-impl transformer_engine: {reason}; use --transformer-impl local")
    return not reason


def kernels_notice(config: Config) -> str | None:
    """A line for the log where `auto` passes over an installed Transformer Engine, else None."""
    installed = Installed.here()
    if config.memory.transformer_impl != "auto" or not installed.transformer_engine or not installed.capability:
        return None
    reason = why_not_transformer_engine(config, installed)
    return f"layers are the local ones: {reason}" if reason else None


def why_not_transformer_engine(config: Config, installed: Installed) -> str | None:
    """The reason for which Transformer Engine's layers cannot be used, or None."""
    if installed.transformer_engine is None:
        return "Transformer Engine is not installed"
    if installed.capability is None:
        return "Transformer Engine needs a GPU"
    accepted = accepted_transformer_engine()
    if accepted and not accepted.specifier.contains(Version(installed.transformer_engine), prereleases=True):
        return (
            f"Transformer Engine {installed.transformer_engine} is installed, Megatron-Core "
            f"{importlib.metadata.version('megatron-core')} takes {accepted.specifier}"
        )
    if config.shape is not None and not config.shape.learned_positions:
        return "rotary positions are applied by the local layers' attention"
    if config.precision.name == "fp32":
        return "Transformer Engine has no attention kernel for packed rows in fp32; use --bf16"
    return _why_no_attention(config, installed)


def _why_no_attention(config: Config, installed: Installed) -> str | None:
    assert installed.capability is not None and config.shape is not None
    if installed.capability < (8, 0):
        return "Transformer Engine has no attention kernel for packed rows before the A100"
    if installed.flash_attention_2:
        return None
    dropout = config.shape.attention_dropout
    if installed.capability >= (9, 0) and installed.cudnn >= CUDNN_FOR_PACKED_ROWS:
        return None
    if installed.flash_attention_3 and installed.capability == (9, 0) and not dropout:
        return None
    remedy = "install flash-attn 2"
    if dropout and installed.flash_attention_3:
        remedy += ", or set --attention-dropout 0"
    return f"Transformer Engine has no attention kernel for packed rows here ({remedy})"


def fuses_gradient_accumulation(config: Config) -> bool:
    """Whether the products that give weight gradients add them to the accumulated ones themselves.

    It saves writing and reading each gradient once per micro-batch. Megatron-Core's own output
    layer needs apex's kernel for it, next to Transformer Engine's layers too.
    """
    if not torch.cuda.is_available() or config.lora.rank:  # frozen weights have no gradients
        return False
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def accepted_transformer_engine() -> Requirement | None:
    """The versions that the installed Megatron-Core declares, None if it declares none."""
    for line in importlib.metadata.requires("megatron-core") or []:
        requirement = Requirement(line)
        if requirement.name.replace("_", "-").lower() == "transformer-engine":
            return requirement
    return None


def _importable() -> bool:
    """Whether Megatron-Core could import Transformer Engine."""
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
    except ImportError:
        return False
    return HAVE_TE


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
