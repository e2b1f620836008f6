"""LoRA adapters as tensors: what they are called in checkpoints and in PEFT, and how they merge into the weights. No Megatron here.

For programs that read adapters: a checkpoint of a LoRA run holds the adapters alone, as torch_dist tensors stacked over layers,

    decoder.layers.<path>.lora_a   [layers, rank, inputs]
    decoder.layers.<path>.lora_b   [layers, outputs, rank]

with the paths of `TARGETS`, and the training flags lora_rank, lora_alpha, lora_dropout and lora_targets beside them
(`AdapterConfig.from_args`). Read these tensors into a dict; then
  - PEFT directory: `adapter_model.safetensors` = `to_peft(tensors)`, `adapter_config.json` = `config.to_peft(base_model)`;
  - merged weights: for each tensor of the base model by its Hugging Face name, `merged(name, weight, tensors, config)`.
GPTBigCode's maps are nn.Linear and its fused query-key-value rows are Megatron's, so nothing is transposed or permuted.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_ft.checkpoint.names import LAYER, layer_of, weight_of

# The linear maps of a layer that can have adapters, and where they are in it.
TARGETS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
_HF_BY_CORE = {weight.core: weight.hf for weight in LAYER}
# The same in GPTBigCode: attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj.
HF_TARGETS = {target: _HF_BY_CORE[f"{path}.weight"].removesuffix(".weight") for target, path in TARGETS.items()}


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
    def from_args(cls, args: argparse.Namespace | Mapping) -> "AdapterConfig":
        """From training flags, parsed or as a checkpoint keeps them."""
        flags = args if isinstance(args, Mapping) else vars(args)
        targets = tuple(dict.fromkeys(flags["lora_targets"].split(",")))
        return cls(flags["lora_rank"], flags["lora_alpha"], flags["lora_dropout"], targets)

    def to_peft(self, base_model: str | None = None) -> dict:
        """Fields of PEFT's adapter_config.json; `base_model` is the path or name it is to be loaded on."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
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
    return f"decoder.layers.{TARGETS[target]}.{part}"


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters by PEFT's names, one contiguous tensor a layer, from tensors stacked over layers (see above)."""
    named = {}
    for target, hf_name in HF_TARGETS.items():
        for part, peft_part in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            for layer, tensor in enumerate(tensors.get(stacked_name(target, part), ())):
                named[f"base_model.model.transformer.h.{layer}.{hf_name}.{peft_part}.weight"] = tensor.contiguous()
    return named


def merged(hf_name: str, weight: Tensor, tensors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base tensor called `hf_name` ("transformer.h.3.attn.c_attn.weight") with its adapter added, in its own dtype.

    The sum is formed in fp32. Tensors without an adapter come back as they are.
    """
    layer = layer_of(hf_name)
    for target in config.targets:
        if layer is not None and weight_of(hf_name).core == f"{TARGETS[target]}.weight":
            a, b = (tensors[stacked_name(target, part)][layer].float() for part in ("lora_a", "lora_b"))
            return (weight.float() + config.scaling * (b @ a)).to(weight.dtype)
    return weight
