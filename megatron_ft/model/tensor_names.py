"""One table of tensor names: Hugging Face GPTBigCode, Megatron-Core, and Megatron before Core.

For example, the fused query, key and value weight of layer 3, [rows, h]:

    HF             transformer.h.3.attn.c_attn.weight                   rows = q heads | k | v
    Megatron-Core  decoder.layers.3.self_attention.linear_qkv.weight    same, sharded on axis 0
    legacy         language_model.encoder.layers.3.self_attention.
      multi-query    query.weight and key_value.weight    q sharded, [k | v] equal on all ranks
      multi-head     query_key_value.weight               per head q, k, v

torch_dist checkpoints use Megatron-Core's names for Transformer Engine's layers (layer norms belong
to the linear layers after them), whichever layers wrote them. They stack the layers on axis 0,
without their number in the key.
"""

import re
from typing import NamedTuple

from megatron_ft.model.shape import ModelShape


class Weight(NamedTuple):
    """One tensor's three names, without layer prefixes."""

    hf: str
    core: str
    legacy: str
    tp_dim: int | None  # axis that tensor parallelism shards; None: replicated


LAYER = (
    Weight("ln_1.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", None),
    Weight("ln_1.bias", "self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", None),
    Weight("attn.c_attn.weight", "self_attention.linear_qkv.weight", "self_attention.query_key_value.weight", 0),
    Weight("attn.c_attn.bias", "self_attention.linear_qkv.bias", "self_attention.query_key_value.bias", 0),
    Weight("attn.c_proj.weight", "self_attention.linear_proj.weight", "self_attention.dense.weight", 1),
    Weight("attn.c_proj.bias", "self_attention.linear_proj.bias", "self_attention.dense.bias", None),
    Weight("ln_2.weight", "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", None),
    Weight("ln_2.bias", "mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", None),
    Weight("mlp.c_fc.weight", "mlp.linear_fc1.weight", "mlp.dense_h_to_4h.weight", 0),
    Weight("mlp.c_fc.bias", "mlp.linear_fc1.bias", "mlp.dense_h_to_4h.bias", 0),
    Weight("mlp.c_proj.weight", "mlp.linear_fc2.weight", "mlp.dense_4h_to_h.weight", 1),
    Weight("mlp.c_proj.bias", "mlp.linear_fc2.bias", "mlp.dense_4h_to_h.bias", None),
)
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
WHOLE = (
    Weight(WTE, "embedding.word_embeddings.weight", "embedding.word_embeddings.weight", 0),
    Weight(WPE, "embedding.position_embeddings.weight", "embedding.position_embeddings.weight", None),
    Weight("transformer.ln_f.weight", "decoder.final_layernorm.weight", "encoder.final_layernorm.weight", None),
    Weight("transformer.ln_f.bias", "decoder.final_layernorm.bias", "encoder.final_layernorm.bias", None),
)
# The last pipeline stage's copy of the tied embedding, in Megatron-Core.
OUTPUT_LAYER = "output_layer.weight"

# The linear layers that can have LoRA adapters, and their modules in a transformer layer.
LORA_TARGETS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
_LAYER_BY_HF = {weight.hf: weight for weight in LAYER}
_LAYER_BY_CORE = {weight.core: weight for weight in LAYER}
_WHOLE_BY_HF = {weight.hf: weight for weight in WHOLE}
_WHOLE_BY_CORE = {weight.core: weight for weight in WHOLE}
# Without Transformer Engine the layer norms are modules of their own.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def hf_names(shape: ModelShape) -> list[str]:
    """All tensor names of the HF model in order, without the tied head."""
    layers = [f"transformer.h.{layer}.{weight.hf}" for layer in range(shape.num_layers) for weight in LAYER]
    return [WTE, WPE, *layers, "transformer.ln_f.weight", "transformer.ln_f.bias"]


def layer_of(hf_name: str) -> int | None:
    """Layer number in an HF tensor name, None for embeddings and the final norm."""
    match = re.match(r"transformer\.h\.(\d+)\.", hf_name)
    return int(match.group(1)) if match else None


def weight_of(hf_name: str) -> Weight:
    """The entry of an HF tensor name. Raises KeyError for a name that is not GPTBigCode's."""
    if layer_of(hf_name) is None:
        return _WHOLE_BY_HF[hf_name]
    return _LAYER_BY_HF[hf_name.split(".", 3)[3]]


def hf_shape(shape: ModelShape, hf_name: str) -> tuple[int, ...]:
    """The tensor's shape in the HF model. Raises KeyError for a name that is not GPTBigCode's."""
    h, f, qkv = shape.hidden_size, shape.ffn_hidden_size, shape.qkv_rows
    return {
        WTE: (shape.vocab_size, h),
        WPE: (shape.max_position_embeddings, h),
        "attn.c_attn.weight": (qkv, h),
        "attn.c_attn.bias": (qkv,),
        "attn.c_proj.weight": (h, h),
        "mlp.c_fc.weight": (f, h),
        "mlp.c_fc.bias": (f,),
        "mlp.c_proj.weight": (h, f),
    }.get(weight_of(hf_name).hf, (h,))


def core_to_hf(name: str, first_layer: int = 0) -> str | None:
    """HF name of a parameter of Megatron-Core's GPTModel (either kind of layer), or None.

    `first_layer` is the number of this pipeline stage's first layer: modules number theirs from 0.
    """
    if name == OUTPUT_LAYER:
        return WTE
    if name in _WHOLE_BY_CORE:
        return _WHOLE_BY_CORE[name].hf
    match = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        return None
    rest = match.group(2)
    for local, core in _LOCAL_NORMS.items():
        if rest.startswith(local):
            rest = core + rest.removeprefix(local)
    weight = _LAYER_BY_CORE.get(rest)
    return f"transformer.h.{int(match.group(1)) + first_layer}.{weight.hf}" if weight else None


def hf_to_core(hf_name: str) -> str:
    """torch_dist key with the layer number, `decoder.layers.3.mlp.linear_fc1.weight`."""
    layer, weight = layer_of(hf_name), weight_of(hf_name)
    return weight.core if layer is None else f"decoder.layers.{layer}.{weight.core}"


def hf_to_stacked(hf_name: str) -> tuple[str, int | None]:
    """torch_dist key without layer number, and the layer's row on axis 0.

    The row is None for a tensor that is not a layer's.
    """
    layer, weight = layer_of(hf_name), weight_of(hf_name)
    return (weight.core, None) if layer is None else (f"decoder.layers.{weight.core}", layer)
