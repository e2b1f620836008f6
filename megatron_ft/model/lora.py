"""LoRA adapters as tensors: their settings, their names in checkpoints, merging them into weights.

A checkpoint of a LoRA run has only the adapters, as torch_dist tensors stacked over layers,

    decoder.layers.<path>.lora_a   [layers, rank, inputs]
    decoder.layers.<path>.lora_b   [layers, outputs, rank]

with the paths of `LORA_TARGETS`. Its manifest has the training flags lora_rank, lora_alpha,
lora_dropout and lora_targets (`AdapterConfig.from_flags`). From a dict of these tensors `merged`
adds the adapters to a tensor of the base model. PEFT's names: peft_tensors.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional, require
from megatron_ft.model.peft_fields import check_plain
from megatron_ft.model.shape import MOST_WIDTH
from megatron_ft.model.tensor_names import LORA_TARGETS, layer_of, weight_of


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

    def to_peft(self, modules: Mapping[str, list[str]], base_model: str | None = None) -> dict:
        """Fields of PEFT's adapter_config.json; `base_model` is a path or name, or left out.

        `modules` has the names of each target's modules in the base model.
        """
        return {
            **({"base_model_name_or_path": base_model} if base_model else {}),
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": [module for target in self.targets for module in modules[target]],
            "bias": "none",
            "fan_in_fan_out": False,
        }


def is_trainable(name: str) -> bool:
    """Whether a parameter or tensor belongs to an adapter; LoRA trains and saves only these."""
    return name.endswith((".lora_a", ".lora_b"))


def stacked_name(target: str, part: str) -> str:
    """torch_dist key of a target's `lora_a` or `lora_b`, with all layers stacked on axis 0."""
    return f"decoder.layers.{LORA_TARGETS[target]}.{part}"


def merged(name: str, weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base tensor `name` with its adapter added.

    The sum is computed in fp32 and returned in the weight's dtype; a tensor without an adapter is
    returned unchanged.
    """
    layer = layer_of(name)
    for target in config.targets:
        if layer is not None and weight_of(name).core == f"{LORA_TARGETS[target]}.weight":
            a, b = (tensors[stacked_name(target, part)][layer].float() for part in ("lora_a", "lora_b"))
            return (weight.float() + config.scaling * (b @ a)).to(weight.dtype)
    return weight
