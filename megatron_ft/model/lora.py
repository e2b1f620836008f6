"""LoRA adapters as tensors: what they are called in checkpoints and in PEFT, and how they merge into the weights. No Megatron here.

For programs that read adapters: a checkpoint of a LoRA run holds the adapters alone, as torch_dist tensors stacked over layers,

    decoder.layers.<path>.lora_a   [layers, rank, inputs]
    decoder.layers.<path>.lora_b   [layers, outputs, rank]

with the paths of `LORA_TARGETS`, and the training flags lora_rank, lora_alpha, lora_dropout and lora_targets beside them
(`AdapterConfig.from_flags`). Read these tensors into a dict; then
  - PEFT directory: `adapter_model.safetensors` = `to_peft(tensors)`, `adapter_config.json` = `config.to_peft(base_model)`, and
    `from_peft` and `AdapterConfig.from_peft` are the way back;
  - merged weights: for each tensor of the base model by its Hugging Face name, `merged(name, weight, tensors, config)`.
GPTBigCode's maps are nn.Linear and its fused query-key-value rows are Megatron's, so nothing is transposed or permuted.
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
    """What LoRA flags say: the update of a weight is alpha / rank * B A."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @classmethod
    def from_flags(cls, flags: Mapping) -> "AdapterConfig":
        """From training flags by their names with underscores, as a manifest has them."""
        targets = tuple(dict.fromkeys(flags["lora_targets"].split(",")))
        return cls(flags["lora_rank"], flags["lora_alpha"], flags["lora_dropout"], targets)

    @classmethod
    def from_peft(cls, config: Mapping, tensors: Mapping[str, Tensor], where: str) -> "AdapterConfig":
        """From adapter_config.json; the targets are those that `tensors` (of `from_peft`) has. Raises UserError, naming `where`, for
        an adapter that computes something else than alpha / rank * B A."""
        unknown = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
        if config.get("peft_type") != "LORA" or unknown:
            found = unknown[0] if unknown else f"peft_type {config.get('peft_type')}"
            raise UserError(f"{where}: {found} is not supported; expected plain LoRA")
        targets = tuple(target for target in LORA_TARGETS if stacked_name(target, "lora_a") in tensors)
        return cls(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), targets)

    def differences(self, other: "AdapterConfig") -> list[str]:
        """What makes two configurations different adapters, by the flags' names; dropout does not."""
        pairs = {
            "--lora-rank": (self.rank, other.rank),
            "--lora-alpha": (f"{self.alpha:g}", f"{other.alpha:g}"),
            "--lora-targets": tuple(",".join(t for t in LORA_TARGETS if t in one.targets) for one in (self, other)),
        }
        return [f"{flag} was {was}, is {now}" for flag, (was, now) in pairs.items() if was != now]

    def to_peft(self, base_model: str | None = None) -> dict:
        """Fields of PEFT's adapter_config.json; `base_model` is the path or name it is to be loaded on, left out when None."""
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
    """Whether the parameter or checkpoint tensor called `name` belongs to an adapter, which is all that a LoRA run trains and saves."""
    return name.endswith((".lora_a", ".lora_b"))


def stacked_name(target: str, part: str) -> str:
    """Name in a torch_dist checkpoint of a target's `lora_a` or `lora_b`, all layers stacked on dimension 0."""
    return f"decoder.layers.{LORA_TARGETS[target]}.{part}"


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by PEFT's names, one contiguous tensor a layer, from tensors stacked over layers (see above)."""
    named = {}
    for target, hf_name in HF_TARGETS.items():
        for part, peft_part in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, tensor in enumerate(tensors.get(stacked_name(target, part), ())):
                named[f"base_model.model.transformer.h.{layer}.{hf_name}.{peft_part}.weight"] = tensor.contiguous()
    return named


def from_peft(named: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The way back: tensors stacked over layers. Raises UserError, naming `where`, for what is no LoRA of GPTBigCode's linear maps."""
    targets = {hf_name: target for target, hf_name in HF_TARGETS.items()}
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in named.items():
        match = re.fullmatch(r"base_model\.model\.transformer\.h\.(\d+)\.(.+)\.lora_([AB])\.weight", name)
        if not match or match[2] not in targets:
            raise UserError(f"{where}: {name} is not supported; expected LoRA of {', '.join(targets)} alone")
        layers.setdefault(stacked_name(targets[match[2]], f"lora_{match[3].lower()}"), {})[int(match[1])] = tensor
    depth = 1 + max((layer for found in layers.values() for layer in found), default=-1)
    for key, found in layers.items():
        if sorted(found) != list(range(depth)) or len({tensor.shape for tensor in found.values()}) > 1:
            raise UserError(f"{where}: {key} is not of one rank in all {depth} layers, which is not supported")
    return {key: torch.stack([found[layer] for layer in range(depth)]) for key, found in layers.items()}


def merged(hf_name: str, weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base tensor called `hf_name` ("transformer.h.3.attn.c_attn.weight") with its adapter added, in its own dtype.

    The sum is formed in fp32. Tensors without an adapter come back as they are.
    """
    layer = layer_of(hf_name)
    for target in config.targets:
        if layer is not None and weight_of(hf_name).core == f"{LORA_TARGETS[target]}.weight":
            a, b = (tensors[stacked_name(target, part)][layer].float() for part in ("lora_a", "lora_b"))
            return (weight.float() + config.scaling * (b @ a)).to(weight.dtype)
    return weight
