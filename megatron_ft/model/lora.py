"""LoRA adapters as tensors: their names in checkpoints and in PEFT, and merging them into weights.

A checkpoint of a LoRA run has only the adapters, as torch_dist tensors stacked over layers,

    decoder.layers.<path>.lora_a   [layers, rank, inputs]
    decoder.layers.<path>.lora_b   [layers, outputs, rank]

with the paths of `LORA_TARGETS`. Its manifest has the training flags lora_rank, lora_alpha,
lora_dropout and lora_targets (`AdapterConfig.from_flags`). From a dict of these tensors,
  - `to_peft` makes the tensors of PEFT's adapter_model.safetensors, and `AdapterConfig.to_peft` its
    adapter_config.json; `from_peft` and `AdapterConfig.from_peft` are the inverses;
  - `merged` adds the adapters to a tensor of the base model.
GPTBigCode's linear layers are nn.Linear and its fused query-key-value rows are Megatron's, so
nothing is transposed or permuted.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional, require
from megatron_ft.model.peft_fields import check_plain
from megatron_ft.model.shape import MOST_WIDTH
from megatron_ft.model.tensor_names import LAYER, LORA_TARGETS, layer_of, weight_of

_HF_BY_CORE = {weight.core: weight.hf for weight in LAYER}
# The same in GPTBigCode: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj.
HF_TARGETS = {target: _HF_BY_CORE[f"{path}.weight"].removesuffix(".weight") for target, path in LORA_TARGETS.items()}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of LoRA: the update of a weight is alpha / rank * B A."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "AdapterConfig":
        """From training flags by their names with underscores."""
        targets = tuple(dict.fromkeys(flags["lora_targets"].split(",")))
        return cls(flags["lora_rank"], flags["lora_alpha"], flags["lora_dropout"], targets)

    @classmethod
    def from_manifest(cls, args: Mapping[str, Any], where: str) -> "AdapterConfig":
        """From the flags in a manifest. Raises UserError, naming `where`, if they are malformed."""
        require(args, "lora_rank", int, where, low=1, high=MOST_WIDTH)
        for name in ("lora_alpha", "lora_dropout"):
            require(args, name, float, where)
        if unknown := [t for t in require(args, "lora_targets", str, where).split(",") if t not in LORA_TARGETS]:
            raise UserError(f"{where}: unknown LoRA target {unknown[0]!r}, expected {', '.join(LORA_TARGETS)}")
        return cls.from_flags(args)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> "AdapterConfig":
        """From adapter_config.json; the targets are those in `tensors` (`from_peft`'s result).

        An adapter with rank-stabilized scaling, alpha / sqrt(rank), becomes one with the alpha that
        gives the same factor. Raises UserError, naming `where`, for an adapter that is not plain
        LoRA (`check_plain`) or whose numbers are malformed.
        """
        check_plain(config, where)
        rank = require(config, "r", int, where, low=1, high=MOST_WIDTH)
        alpha = require(config, "lora_alpha", float, where)
        if config.get("use_rslora"):
            alpha *= math.sqrt(rank)
        targets = tuple(target for target in LORA_TARGETS if stacked_name(target, "lora_a") in tensors)
        return cls(rank, alpha, optional(config, "lora_dropout", float, where, 0.0, low=0, high=1), targets)

    def differences(self, other: "AdapterConfig") -> list[str]:
        """The settings that differ, by their flags; dropout is ignored."""
        pairs = {
            "--lora-rank": (self.rank, other.rank),
            "--lora-alpha": (f"{self.alpha:g}", f"{other.alpha:g}"),
            "--lora-targets": tuple(",".join(t for t in LORA_TARGETS if t in one.targets) for one in (self, other)),
        }
        return [f"{flag} was {was}, is {now}" for flag, (was, now) in pairs.items() if was != now]

    def to_peft(self, base_model: str | None = None) -> dict:
        """Fields of PEFT's adapter_config.json; `base_model` is a path or name, or left out."""
        return {
            **({"base_model_name_or_path": base_model} if base_model else {}),
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": [HF_TARGETS[target] for target in self.targets],
            "bias": "none",
            "fan_in_fan_out": False,
        }


def is_trainable(name: str) -> bool:
    """Whether a parameter or tensor belongs to an adapter; LoRA trains and saves only these."""
    return name.endswith((".lora_a", ".lora_b"))


def stacked_name(target: str, part: str) -> str:
    """torch_dist key of a target's `lora_a` or `lora_b`, with all layers stacked on axis 0."""
    return f"decoder.layers.{LORA_TARGETS[target]}.{part}"


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by PEFT's names, one contiguous tensor per layer, from stacked ones."""
    named = {}
    for target, hf_name in HF_TARGETS.items():
        for part, peft_part in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, tensor in enumerate(tensors.get(stacked_name(target, part), ())):
                named[f"base_model.model.transformer.h.{layer}.{hf_name}.{peft_part}.weight"] = tensor.contiguous()
    return named


def from_peft(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft`: tensors stacked over layers.

    Raises UserError, naming `where`, for anything but LoRA of GPTBigCode's linear layers with one
    rank in all layers, for one of the factors A and B without the other, and for NaN or Inf.
    """
    targets = {hf_name: target for target, hf_name in HF_TARGETS.items()}
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"base_model\.model\.transformer\.h\.(0|[1-9][0-9]{0,4})\.(.+)\.lora_([AB])\.weight", name)
        if not match or match[2] not in targets:
            raise UserError(f"{where}: {name} is not supported, expected only LoRA of {', '.join(targets)}")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{where}: {name} has shape {list(tensor.shape)} in {tensor.dtype}, expected a matrix")
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{where}: {name} has values that are NaN or Inf; use a checkpoint from before training diverged"
            )
        layers.setdefault(stacked_name(targets[match[2]], f"lora_{match[3].lower()}"), {})[int(match[1])] = tensor
    if not layers:
        raise UserError(f"{where}: has no LoRA tensors, expected those of {', '.join(targets)}")
    depth = 1 + max(layer for found in layers.values() for layer in found)
    for hf_name, target in targets.items():
        a, b = (layers.get(stacked_name(target, part), {}) for part in ("lora_a", "lora_b"))
        if odd := sorted(a.keys() ^ b.keys()):
            part = "lora_B" if odd[0] in a else "lora_A"
            raise UserError(f"{where}: layer {odd[0]} has no {hf_name}.{part}, only the other factor")
    for key, found in layers.items():
        if len(found) < depth or len({tensor.shape for tensor in found.values()}) > 1:
            raise UserError(f"{where}: {key} does not have one rank in all {depth} layers, which is not supported")
    return {key: torch.stack([found[layer] for layer in range(depth)]) for key, found in layers.items()}


def merged(hf_name: str, weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base tensor `hf_name` ("transformer.h.3.attn.c_attn.weight") with its adapter added.

    The sum is computed in fp32 and returned in the weight's dtype; a tensor without an adapter is
    returned unchanged.
    """
    layer = layer_of(hf_name)
    for target in config.targets:
        if layer is not None and weight_of(hf_name).core == f"{LORA_TARGETS[target]}.weight":
            a, b = (tensors[stacked_name(target, part)][layer].float() for part in ("lora_a", "lora_b"))
            return (weight.float() + config.scaling * (b @ a)).to(weight.dtype)
    return weight
