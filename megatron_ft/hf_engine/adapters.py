"""LoRA, DoRA and QLoRA by PEFT, with the flags of the Megatron-Core engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from megatron_ft.config.config import Config
from megatron_ft.config.flags import Lora
from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_json
from megatron_ft.model.tensor_names import LORA_TARGETS
from megatron_ft.printable import printable
from megatron_ft.weights.locate import ADAPTER

# The linear layers of a transformer layer under the names that families of transformers give them,
# by ours. The longer name tells two c_proj apart.
MODULES: Mapping[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value", "Wqkv"),
    "linear_proj": ("o_proj", "out_proj", "attn.c_proj", "self_attn.dense", "self_attention.dense", "attention.dense"),
    "linear_fc1": ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "linear_fc2": ("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h"),
}


def target_modules(model: PreTrainedModel, lora: Lora) -> list[str]:
    """Ends of the names of the modules that get adapters, for PEFT's `target_modules`.

    `--lora-targets` has our names, or those of the model's own modules; by default, all linear
    layers but the output layer. Raises UserError for a name that no linear layer has.
    """
    output = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if _is_linear(module) and module is not output]
    if lora.targets == Lora().targets:
        return sorted({_end(name) for name in linear})
    found: list[str] = []
    for target in dict.fromkeys(lora.targets.split(",")):
        ends = [end for end in MODULES.get(target, (target,)) if any(_ends(name, end) for name in linear)]
        if not ends:
            there = sorted({_end(name) for name in linear})
            raise UserError(
                f"--lora-targets: no linear layer of this {model.config.model_type} is a {printable(target)}; "
                f"name some of {', '.join(there)}, or of {', '.join(LORA_TARGETS)}"
            )
        found += ends
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, also one of GPT-2's or of bitsandbytes."""
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")


def _end(name: str) -> str:
    """The last parts of a module's name: "attn.c_proj" of "transformer.h.0.attn.c_proj"."""
    parts = name.split(".")
    return ".".join(part for part in parts[-2:] if not part.isdigit())


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def add_adapters(model: PreTrainedModel, config: Config, base: Path) -> PeftModel:
    """The model with frozen weights and new trainable adapters, which are fp32 and begin at zero.

    Random numbers are drawn by --seed, the same on every rank. `base` is written into the adapters'
    configuration.
    """
    lora = config.lora
    if lora.quantize_base:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.name_or_path = str(base)
    torch.manual_seed(config.training.seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=target_modules(model, lora),
            use_dora=lora.dora,
            task_type="CAUSAL_LM",
        ),
    )


def load_adapters(model: PeftModel, directory: Path, config: Config) -> None:
    """Fill the adapters from a PEFT directory. Raises UserError if they differ from the flags."""
    saved, lora = read_json(directory / ADAPTER), config.lora
    pairs: dict[str, tuple[Any, Any]] = {
        "--lora-rank": (saved.get("r"), lora.rank),
        "--lora-alpha": (saved.get("lora_alpha"), lora.alpha),
        "--lora-dora": (bool(saved.get("use_dora")), lora.dora),
    }
    differences = [f"{flag} was {was}, is {now}" for flag, (was, now) in pairs.items() if was != now]
    if not differences:
        weights = load_peft_weights(str(directory), device="cpu")
        ours = {name for name, _ in model.named_parameters() if "lora_" in name}
        theirs = {name.replace(".weight", ".default.weight") for name in weights}
        theirs = {name.replace("magnitude_vector", "magnitude_vector.default.weight") for name in theirs}
        if ours != theirs:
            odd = sorted(ours ^ theirs)[0]
            differences.append(f"--lora-targets: {odd} is only in {'the flags' if odd in ours else 'the adapters'}")
        else:
            set_peft_model_state_dict(model, weights)
    if differences:
        raise UserError(
            f"{directory}: its adapters differ from the flags: {printable('; '.join(differences))}; give their flags to "
            "continue training them, or merge them with PEFT's merge_and_unload() and --load the result"
        )
