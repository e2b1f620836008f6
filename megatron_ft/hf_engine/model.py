"""Any causal language model of transformers, loaded to be trained on packed sequences."""

import importlib.util
import inspect
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.hf_engine.start import CONFIG, StartingPoint
from megatron_ft.training.batches import MicroBatch

# Names that configurations have for the dropouts of --hidden-dropout and --attention-dropout.
HIDDEN_DROPOUTS = ("embd_pdrop", "resid_pdrop", "embedding_dropout", "residual_dropout", "hidden_dropout", "dropout")
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout")
FLASH = "flash_attention_2"
PROBE = 8  # tokens of each document of the probe
ISOLATION = 1e-3  # of the largest logit; documents that see each other differ by more than 1e-1


def read_config(point: StartingPoint) -> Any:
    """transformers' configuration of the model. Raises UserError for a kind that it lacks."""
    where = point.model / CONFIG
    kind = point.model_config()["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        import transformers

        raise UserError(
            f"{where}: model_type is {kind!r}, which is not a causal language model of transformers "
            f"{transformers.__version__}; give another model, or install a transformers that has it"
        )
    try:
        return AutoConfig.from_pretrained(point.model)
    except Exception as error:  # of many types, and of other packages
        raise UserError(f"{where}: transformers cannot read it: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """The text of another package's error."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def positions_of(config: Any) -> int | None:
    """The longest sequence that a model takes, where its configuration has it."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def with_dropouts(model_config: Any, config: Config) -> None:
    """Set the dropouts of --hidden-dropout and --attention-dropout. Raises UserError for a model
    that has none."""
    for flag, value, names in (
        ("--hidden-dropout", config.model.hidden_dropout, HIDDEN_DROPOUTS),
        ("--attention-dropout", config.model.attention_dropout, ATTENTION_DROPOUTS),
    ):
        if value is None:
            continue
        found = [name for name in names if hasattr(model_config, name)]
        if not found and value:
            raise UserError(f"{flag} {value:g}: a {model_config.model_type} has no such dropout; leave it out")
        for name in found:
            setattr(model_config, name, value)


def weights_dtype(config: Config) -> torch.dtype:
    """Weights that are trained are fp32, with autocast for --bf16 and --fp16; those below adapters
    are of that precision."""
    if not config.lora.rank:
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision.name]


def attention_of(model_config: Any, config: Config, device: torch.device) -> str | None:
    """transformers' name of the attention: variable-length flash attention where it is installed
    and the model takes it; None: torch's where the model has it, with a mask that separates the
    documents."""
    half = config.precision.name != "fp32"
    varlen = device.type == "cuda" and half and config.data.reset_attention_mask and is_flash_attn_2_available()
    takes_it = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)], "_supports_flash_attn", False)
    return FLASH if varlen and takes_it else None


def load_model(directory: Path, model_config: Any, config: Config, device: torch.device) -> PreTrainedModel:
    """The model of a Hugging Face directory, on the CPU unless its weights are quantized.

    Raises UserError if transformers cannot load it, and for weights that are missing or of other
    sizes than its configuration has.
    """
    options: dict[str, Any] = {}
    if config.lora.quantize_base:
        options["quantization_config"] = quantization(config)
        options["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=model_config,
            dtype=weights_dtype(config),
            attn_implementation=attention_of(model_config, config, device),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused below, by name
            **options,
        )
    except (SafetensorError, UnpicklingError) as error:
        raise UserError(f"{directory}: damaged weights ({in_one_line(error)}); copy it again") from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"{directory}: transformers cannot load it: {in_one_line(error)}") from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise UserError(
            f"{directory}: {name} is {list(stored)}, but {list(expected)} by {CONFIG} ({len(mismatched)} differ); "
            "copy both from the same model"
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{directory}: has no weights for {missing[0]} ({len(missing)} are missing); copy it again")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{directory}: a {model_config.model_type} takes no positions, so documents of a packed sequence cannot be "
            "separated; --engine transformers cannot train it"
        )
    return model


def quantization(config: Config) -> BitsAndBytesConfig:
    """bitsandbytes' settings for --quantize-base."""
    if config.lora.quantize_base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if config.precision.bf16 else torch.float16 if config.precision.fp16 else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.lora.quantize_base,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def use_liger(model: PreTrainedModel, config: Config, device: torch.device) -> str | None:
    """Use Liger's kernels for norms, rotations and activations where they are installed; a line for
    the log if so.

    The loss stays ours: Liger's knows no weights of tokens.
    """
    if config.memory.transformer_impl == "local" or device.type != "cuda":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return None
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    losses = ("cross_entropy", "fused_linear_cross_entropy")
    off = {name: False for name in losses if name in inspect.signature(apply).parameters}
    _apply_liger_kernel_to_instance(model=model, **off)
    return f"Liger's kernels for {model.config.model_type} (--transformer-impl local leaves them out)"


def fit_vocabulary(model: Any, tokens: int, config: Config) -> str | None:
    """Give the model as many tokens as the tokenizer has, if it has fewer; a line for the log.

    New rows are the mean of the others. Raises UserError with LoRA, which does not train them.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if tokens <= known:
        return None
    if config.lora.rank:
        raise UserError(
            f"--lora-rank {config.lora.rank}: the tokenizer {config.data.tokenizer_file} has {tokens} tokens, the model "
            f"{known}, and LoRA does not train the embedding; give the model's own tokenizer, or leave --lora-rank out"
        )
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for table in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            table.weight[known:] = table.weight[:known].mean(0)
    return f"the tokenizer has {tokens} tokens, the model {known}: {tokens - known} new ones begin as the mean of the others"


def logits_of(model: nn.Module, micro: MicroBatch, config: Config, attention: str | None) -> Tensor:
    """Logits [1, t, vocabulary] of a micro-batch; `attention` is transformers' name of the model's.

    Positions separate the documents: transformers derives bounds or a mask from them where there is
    no mask and no cache; bounds, for flash attention, only from a single row. A mask of ones lets
    documents of a sequence see each other.
    """
    rows = 1 if attention == FLASH else config.training.micro_batch_size
    tokens, positions = micro.tokens.view(rows, -1), micro.position_ids.view(rows, -1)
    mask = None if config.data.reset_attention_mask else torch.ones_like(tokens)
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False)
    return output.logits.reshape(1, tokens.numel(), -1)


@torch.no_grad()
def check_isolation(model: nn.Module, kind: str, device: torch.device) -> None:
    """Raise UserError if the documents of a packed sequence see each other.

    The logits of a document must not depend on the one before it. `model` is in evaluation mode.
    """
    positions = torch.arange(PROBE, device=device).repeat(2)[None]
    tokens = torch.arange(1, 2 * PROBE + 1, device=device)[None]
    other = tokens.clone()
    other[0, :PROBE] = tokens[0, :PROBE].flip(0)
    first, second = (
        model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False).logits[0, PROBE:].float()
        for ids in (tokens, other)
    )
    if (first - second).abs().max() > ISOLATION * first.abs().max():
        raise UserError(
            f"a {kind} in transformers does not keep the documents of a packed sequence apart; "
            "add --no-reset-attention-mask to let them see each other, or --seq-length so short that one fits"
        )
