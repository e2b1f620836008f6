"""StarCoder2: rotary positions, grouped key/value heads and a sliding window of attention."""

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional, require
from megatron_ft.model.family import EXACT_GELU, TANH_GELU, Family, activation_of, given, shown
from megatron_ft.model.shape import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, ModelShape, check_heads

DEFAULT_ROTARY_BASE = 10000.0  # transformers', where a configuration has none


def _read_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Shape of a Starcoder2Config, as transformers 4 and 5 write it."""
    activation = config.get("hidden_act", TANH_GELU[0])
    if activation not in (*TANH_GELU, *EXACT_GELU):
        raise UserError(
            f"{where}: hidden_act is {shown(activation)}, "
            f"expected the tanh GELU {TANH_GELU[0]!r} or the exact one, {EXACT_GELU[0]!r}"
        )
    if given(config, "use_bias", bool, where, True) is False:
        raise UserError(f"{where}: use_bias is false, expected true, as in every published StarCoder2")
    dropout = given(config, "residual_dropout", float, where, 0.0, high=1)
    if dropout != given(config, "embedding_dropout", float, where, 0.0, high=1):
        raise UserError(
            f"{where}: embedding_dropout and residual_dropout differ; "
            "Megatron has one hidden dropout, give them one value"
        )
    hidden = require(config, "hidden_size", int, where, low=1, high=MOST_WIDTH)
    heads = require(config, "num_attention_heads", int, where, low=1, high=MOST_WIDTH)
    check_heads(hidden, heads, f"{where}: hidden_size", "num_attention_heads")
    groups = require(config, "num_key_value_heads", int, where, low=1, high=MOST_WIDTH)
    if heads % groups:
        raise UserError(f"{where}: num_key_value_heads {groups} does not divide the {heads} attention heads")
    if hidden // heads % 2 or optional(config, "head_dim", int, where, hidden // heads) != hidden // heads:
        raise UserError(f"{where}: attention heads of another size than {hidden} / {heads}, which must be even")
    return ModelShape(
        family=STARCODER2.model_type,
        num_layers=require(config, "num_hidden_layers", int, where, low=1, high=MOST_LAYERS),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        max_position_embeddings=require(config, "max_position_embeddings", int, where, low=1, high=MOST_ROWS),
        vocab_size=require(config, "vocab_size", int, where, low=1, high=MOST_ROWS),
        ffn_hidden_size=require(config, "intermediate_size", int, where, low=1, high=MOST_WIDTH),
        rotary_base=_rotary_base(config, where),
        window_size=optional(config, "sliding_window", int, where, 0, low=1, high=MOST_ROWS),
        untie_embeddings_and_output_weights=given(config, "tie_word_embeddings", bool, where, True) is False,
        layernorm_epsilon=given(config, "norm_epsilon", float, where, 1e-5),
        init_method_std=given(config, "initializer_range", float, where, 0.018042),
        hidden_dropout=dropout,
        attention_dropout=given(config, "attention_dropout", float, where, 0.0, high=1),
        exact_gelu=activation in EXACT_GELU,
    )


def _rotary_base(config: Mapping[str, Any], where: str) -> float:
    """The base of rotary positions: transformers 5 has it in `rope_parameters`, which take
    precedence over the `rope_theta` and `rope_scaling` of transformers 4."""
    parameters = optional(config, "rope_parameters", dict, where, None)
    scaling = parameters if parameters is not None else optional(config, "rope_scaling", dict, where, {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UserError(f"{where}: rotary positions of type {shown(kind)}, expected 'default', without scaling")
    if unknown := [name for name in scaling if name not in ("rope_theta", "rope_type", "type")]:
        raise UserError(f"{where}: {unknown[0]} of the rotary positions is not supported, expected only rope_theta")
    found = config if parameters is None or "rope_theta" not in parameters else parameters
    return optional(found, "rope_theta", float, where, DEFAULT_ROTARY_BASE, low=1)


def _notices(config: Mapping[str, Any]) -> list[str]:
    """A line for the log about what a configuration leaves to transformers' defaults."""
    if config.get("rope_theta") is None and not (config.get("rope_parameters") or {}).get("rope_theta"):
        return [f"neither rope_parameters nor rope_theta: rotary positions have the base {DEFAULT_ROTARY_BASE:g}"]
    return []


def _write_config(shape: ModelShape) -> dict[str, Any]:
    """Fields of a Starcoder2Config, which transformers 4 and 5 both read."""
    return {
        "architectures": [STARCODER2.architecture],
        "model_type": STARCODER2.model_type,
        "hidden_act": activation_of(shape),
        "attention_dropout": shape.attention_dropout,
        "embedding_dropout": shape.hidden_dropout,
        "residual_dropout": shape.hidden_dropout,
        "hidden_size": shape.hidden_size,
        "initializer_range": shape.init_method_std,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "norm_epsilon": shape.layernorm_epsilon,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "rope_parameters": {"rope_theta": shape.rotary_base, "rope_type": "default"},
        "rope_theta": shape.rotary_base,
        "sliding_window": shape.window_size or None,
        "tie_word_embeddings": not shape.untie_embeddings_and_output_weights,
        "use_bias": True,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def _check(shape: ModelShape) -> None:
    """Raise UserError, naming flags, for what transformers' Starcoder2 does not have."""
    if shape.learned_positions:
        raise UserError(
            "--position-embedding-type absolute: StarCoder2 has rotary positions; leave it out, or say rope"
        )
    if shape.kv_channels % 2:
        raise UserError(
            f"--num-attention-heads {shape.num_attention_heads}: {shape.kv_channels} channels per head are odd, and "
            "rotary positions need pairs; choose another number of heads"
        )


def _published(**numbers: Any) -> ModelShape:
    return ModelShape(
        family="starcoder2",
        max_position_embeddings=16384,
        window_size=4096,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        **numbers,
    )


STARCODER2 = Family(
    model_type="starcoder2",
    title="StarCoder2",
    models="StarCoder2 3B, 7B, 15B",
    architecture="Starcoder2ForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    notices=_notices,
    check=_check,
    prefix="model.",
    modules={
        "word_embeddings": ("model.embed_tokens",),
        "input_layernorm": ("model.layers.{}.input_layernorm",),
        "linear_qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "linear_proj": ("model.layers.{}.self_attn.o_proj",),
        "pre_mlp_layernorm": ("model.layers.{}.post_attention_layernorm",),
        "linear_fc1": ("model.layers.{}.mlp.c_fc",),
        "linear_fc2": ("model.layers.{}.mlp.c_proj",),
        "final_layernorm": ("model.norm",),
        "output_layer": ("lm_head",),
    },
    # The models' Hugging Face configurations.
    presets={
        "starcoder2-15b": _published(
            num_layers=40, hidden_size=6144, num_attention_heads=48, num_query_groups=4, init_method_std=0.01275,
            rotary_base=100000.0, untie_embeddings_and_output_weights=True,
        ),
        "starcoder2-7b": _published(
            num_layers=32, hidden_size=4608, num_attention_heads=36, num_query_groups=4, init_method_std=0.018042,
            rotary_base=1000000.0,
        ),
        "starcoder2-3b": _published(
            num_layers=30, hidden_size=3072, num_attention_heads=24, num_query_groups=2, init_method_std=0.018042,
            rotary_base=999999.4420358813,
        ),
    },
)  # fmt: skip
