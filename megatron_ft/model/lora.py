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

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ft.errors import UserError
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
    def from_flags(cls, flags: Mapping) -> "AdapterConfig":
        """From training flags by their names with underscores, as a manifest has them."""
        targets = tuple(dict.fromkeys(flags["lora_targets"].split(",")))
        return cls(flags["lora_rank"], flags["lora_alpha"], flags["lora_dropout"], targets)

    @classmethod
    def from_peft(cls, config: Mapping, tensors: Mapping[str, Tensor], where: str) -> "AdapterConfig":
        """From adapter_config.json; the targets are those in `tensors` (`from_peft`'s result).

        Raises UserError, naming `where`, for an adapter that does not compute alpha / rank * B A.
        """
        unknown = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
        if config.get("peft_type") != "LORA" or unknown:
            found = unknown[0] if unknown else f"peft_type {config.get('peft_type')}"
            raise UserError(f"{where}: {found} is not supported, expected plain LoRA")
        targets = tuple(target for target in LORA_TARGETS if stacked_name(target, "lora_a") in tensors)
        return cls(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets)

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
    rank in all layers.
    """
    targets = {hf_name: target for target, hf_name in HF_TARGETS.items()}
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"base_model\.model\.transformer\.h\.(\d+)\.(.+)\.lora_([AB])\.weight", name)
        if not match or match[2] not in targets:
            raise UserError(f"{where}: {name} is not supported, expected only LoRA of {', '.join(targets)}")
        layers.setdefault(stacked_name(targets[match[2]], f"lora_{match[3].lower()}"), {})[int(match[1])] = tensor
    depth = 1 + max((layer for found in layers.values() for layer in found), default=-1)
    for key, found in layers.items():
        if sorted(found) != list(range(depth)) or len({tensor.shape for tensor in found.values()}) > 1:
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
