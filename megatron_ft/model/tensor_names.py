"""Names of a model's tensors: the package's own, and those of Megatron's modules and formats.

The package's own names, the same for all families of models, are Megatron-Core's of Transformer
Engine's layers (layer norms belong to the linear layers after them) with the layer's number. For
example, the fused query, key and value weight of layer 3, [rows, h]:

    ours, GPTModel   decoder.layers.3.self_attention.linear_qkv.weight
    torch_dist       decoder.layers.self_attention.linear_qkv.weight     layers stacked on axis 0
    legacy           language_model.encoder.layers.3.self_attention.
      multi-query      query.weight and key_value.weight    q sharded, [k | v] equal on all ranks
      multi-head       query_key_value.weight               per head q, k, v

Its rows are, for each key/value head: those of its query heads, of the key, of the value. Tensor
parallelism cuts them into equal parts, also within a head. Hugging Face's names: hf_names.py.
"""

import re
from typing import NamedTuple

from megatron_ft.model.shape import ModelShape


class Weight(NamedTuple):
    """One tensor, without layer prefixes.

    `module` and `part` are how families name it (Family.modules).
    """

    module: str
    part: str  # "weight" or "bias"
    core: str  # our name, and torch_dist's
    legacy: str
    tp_dim: int | None  # axis that tensor parallelism shards; None: replicated


def _weight_and_bias(module: str, core: str, legacy: str, weight_dim: int | None, bias_dim: int | None):
    return tuple(
        Weight(module, part, f"{core}{part}", f"{legacy}.{part}", dim)
        for part, dim in (("weight", weight_dim), ("bias", bias_dim))
    )


LAYER = (
    *_weight_and_bias("input_layernorm", "self_attention.linear_qkv.layer_norm_", "input_layernorm", None, None),
    *_weight_and_bias("linear_qkv", "self_attention.linear_qkv.", "self_attention.query_key_value", 0, 0),
    *_weight_and_bias("linear_proj", "self_attention.linear_proj.", "self_attention.dense", 1, None),
    *_weight_and_bias("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm_", "post_attention_layernorm", None, None),
    *_weight_and_bias("linear_fc1", "mlp.linear_fc1.", "mlp.dense_h_to_4h", 0, 0),
    *_weight_and_bias("linear_fc2", "mlp.linear_fc2.", "mlp.dense_4h_to_h", 1, None),
)
EMBEDDING, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
# Of untied embeddings. With tied ones, GPTModel has this name for the last pipeline stage's copy.
OUTPUT_LAYER = "output_layer.weight"
WHOLE = (
    Weight("word_embeddings", "weight", EMBEDDING, EMBEDDING, 0),
    Weight("position_embeddings", "weight", POSITIONS, POSITIONS, None),
    *_weight_and_bias("final_layernorm", "decoder.final_layernorm.", "encoder.final_layernorm", None, None),
    Weight("output_layer", "weight", OUTPUT_LAYER, "", 0),
)
# The tensors with one row per token of the vocabulary.
VOCABULARY = (EMBEDDING, OUTPUT_LAYER)

# The linear layers that can have LoRA adapters, and their modules in a transformer layer.
LORA_TARGETS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
_LAYER_BY_CORE = {weight.core: weight for weight in LAYER}
_WHOLE_BY_CORE = {weight.core: weight for weight in WHOLE}
_LAYERS = "decoder.layers."
# Without Transformer Engine the layer norms are modules of their own.
_LOCAL_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def tensor_names(shape: ModelShape) -> list[str]:
    """Our names of all tensors of a model, in the order of its Hugging Face files."""
    names = [EMBEDDING, POSITIONS] if shape.learned_positions else [EMBEDDING]
    names += [f"{_LAYERS}{layer}.{weight.core}" for layer in range(shape.num_layers) for weight in LAYER]
    names += [weight.core for weight in WHOLE if weight.module == "final_layernorm"]
    return [*names, OUTPUT_LAYER] if shape.untie_embeddings_and_output_weights else names


def layer_of(name: str) -> int | None:
    """Layer number in one of our names, None for embeddings, the final norm and the output."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def weight_of(name: str) -> Weight:
    """The entry of one of our names. Raises KeyError for any other."""
    if layer_of(name) is None:
        return _WHOLE_BY_CORE[name]
    return _LAYER_BY_CORE[name.split(".", 3)[3]]


def tensor_shape(shape: ModelShape, name: str) -> tuple[int, ...]:
    """The complete tensor's shape. Raises KeyError for a name that is not one of ours."""
    h, f, qkv = shape.hidden_size, shape.ffn_hidden_size, shape.qkv_rows
    weight = weight_of(name)
    return {
        ("word_embeddings", "weight"): (shape.vocab_size, h),
        ("output_layer", "weight"): (shape.vocab_size, h),
        ("position_embeddings", "weight"): (shape.max_position_embeddings, h),
        ("linear_qkv", "weight"): (qkv, h),
        ("linear_qkv", "bias"): (qkv,),
        ("linear_proj", "weight"): (h, h),
        ("linear_fc1", "weight"): (f, h),
        ("linear_fc1", "bias"): (f,),
        ("linear_fc2", "weight"): (h, f),
    }.get((weight.module, weight.part), (h,))


def name_of_parameter(parameter: str, *, tied: bool, first_layer: int = 0) -> str | None:
    """Our name of a parameter of Megatron-Core's GPTModel (either kind of layer), or None.

    `first_layer` is the number of this pipeline stage's first layer: modules number theirs from 0.
    """
    if parameter == OUTPUT_LAYER and tied:
        return EMBEDDING
    if parameter in _WHOLE_BY_CORE:
        return parameter
    match = re.match(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    if not match:
        return None
    rest = match.group(2)
    for local, core in _LOCAL_NORMS.items():
        if rest.startswith(local):
            rest = core + rest.removeprefix(local)
    return f"{_LAYERS}{int(match.group(1)) + first_layer}.{rest}" if rest in _LAYER_BY_CORE else None


def stacked_key(name: str) -> tuple[str, int | None]:
    """torch_dist key of one of our names, and the layer's row on axis 0.

    The row is None for a tensor that is not a layer's.
    """
    layer = layer_of(name)
    return (name, None) if layer is None else (_LAYERS + weight_of(name).core, layer)
