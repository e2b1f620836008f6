"""GPTBigCode: StarCoder, SantaCoder and every model in their form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional, require
from megatron_ft.model.family import EXACT_GELU, TANH_GELU, Family, activation_of, given, shown
from megatron_ft.model.shape import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, ModelShape, check_heads

# Our own argument in a Megatron checkpoint that was converted from a model with the exact GELU.
ACTIVATION_ARG = "hf_activation_function"


# Models that were derived from GPTBigCode and kept its model_type: their classes, or else fields,
# and what they do not have or have instead.
_OTHER_CLASSES = {"GPTRefactForCausalLM": "; its learned positions (it has ALiBi) and biases are missing"}
_OTHER_FIELDS = {
    "use_rotary_embeddings": "rotary positions instead of learned ones",
    "head_groups": "groups of query heads",
    "attention_window_size": "a window of attention",
}


def _check_is_gpt_bigcode(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for another model that has taken this model_type, naming what it lacks."""
    classes = config.get("architectures") or []
    names = [str(name) for name in classes] if isinstance(classes, list) else [shown(classes)]
    # Before transformers had it, the class was GPTBigCodeLMHeadModel.
    if other := next((name for name in names if not name.startswith("GPTBigCode")), None):
        raise UserError(
            f"{where}: model_type is 'gpt_bigcode', but architectures names {other:.100}, "
            f"expected GPTBigCodeForCausalLM{_OTHER_CLASSES.get(other, '')}"
        )
    if given(config, "use_position_embeddings", bool, where, True) is False:
        raise UserError(f"{where}: use_position_embeddings is false; a GPTBigCode has learned positions")
    for name, what in _OTHER_FIELDS.items():
        if config.get(name):
            raise UserError(f"{where}: {name} is {shown(config[name])}, which is {what}; no GPTBigCode has that")


def _read_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """Shape of a GPTBigCodeConfig."""
    _check_is_gpt_bigcode(config, where)
    activation = config.get("activation_function", TANH_GELU[0])
    if activation not in (*TANH_GELU, *EXACT_GELU):
        raise UserError(
            f"{where}: activation_function is {shown(activation)}, "
            f"expected the tanh GELU {TANH_GELU[0]!r} or the exact one, {EXACT_GELU[0]!r}"
        )
    for name in ("scale_attn_weights", "tie_word_embeddings"):
        if given(config, name, bool, where, True) is False:
            raise UserError(f"{where}: {name} is false, expected true, as in every StarCoder")
    dropout = given(config, "resid_pdrop", float, where, 0.1, high=1)
    if dropout != given(config, "embd_pdrop", float, where, 0.1, high=1):
        raise UserError(
            f"{where}: embd_pdrop and resid_pdrop differ; Megatron has one hidden dropout, give them one value"
        )
    hidden = require(config, "n_embd", int, where, low=1, high=MOST_WIDTH)
    heads = require(config, "n_head", int, where, low=1, high=MOST_WIDTH)
    check_heads(hidden, heads, f"{where}: n_embd", "n_head")
    return ModelShape(
        num_layers=require(config, "n_layer", int, where, low=1, high=MOST_LAYERS),
        hidden_size=hidden,
        num_attention_heads=heads,
        max_position_embeddings=require(config, "n_positions", int, where, low=1, high=MOST_ROWS),
        vocab_size=require(config, "vocab_size", int, where, low=1, high=MOST_ROWS),
        ffn_hidden_size=optional(config, "n_inner", int, where, 0, low=1, high=MOST_WIDTH),
        num_query_groups=1 if given(config, "multi_query", bool, where, True) else heads,
        layernorm_epsilon=given(config, "layer_norm_epsilon", float, where, 1e-5),
        init_method_std=given(config, "initializer_range", float, where, 0.02),
        hidden_dropout=dropout,
        attention_dropout=given(config, "attn_pdrop", float, where, 0.1, high=1),
        exact_gelu=activation in EXACT_GELU,
    )


def _notices(config: Mapping[str, Any]) -> list[str]:
    """A line for the log about the exact GELU."""
    if config.get("activation_function") not in EXACT_GELU:
        return []
    return [
        "activation_function is 'gelu', the exact form, and is taken at its word; StarCoder was pre-trained with the "
        "tanh form (the tools that merged its checkpoints wrote the other word; the difference is about 1e-3), which "
        "--activation gelu_tanh selects"
    ]


def _write_config(shape: ModelShape) -> dict[str, Any]:
    """Fields of a GPTBigCodeConfig."""
    return {
        "architectures": [GPT_BIGCODE.architecture],
        "model_type": GPT_BIGCODE.model_type,
        "activation_function": activation_of(shape),
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "attn_pdrop": shape.attention_dropout,
        "embd_pdrop": shape.hidden_dropout,
        "resid_pdrop": shape.hidden_dropout,
        "initializer_range": shape.init_method_std,
        "layer_norm_epsilon": shape.layernorm_epsilon,
        "multi_query": shape.multi_query,
        "n_embd": shape.hidden_size,
        "n_head": shape.num_attention_heads,
        "n_inner": shape.ffn_hidden_size,
        "n_layer": shape.num_layers,
        "n_positions": shape.max_position_embeddings,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _check(shape: ModelShape) -> None:
    """Raise UserError, naming flags, for what transformers' GPTBigCode does not have."""
    if shape.num_query_groups not in (1, shape.num_attention_heads):
        raise UserError(
            f"--num-query-groups {shape.num_query_groups}: a GPTBigCode (StarCoder) has one key/value head, or one per "
            "query head; StarCoder2 (--position-embedding-type rope) has groups"
        )
    for flag, value in (
        ("--rotary-base", shape.rotary_base),
        ("--window-size", shape.window_size),
        ("--untie-embeddings-and-output-weights", shape.untie_embeddings_and_output_weights),
    ):
        if value:
            raise UserError(
                f"{flag}: a GPTBigCode (StarCoder) has none; "
                "StarCoder2 (--position-embedding-type rope) has, or leave it out"
            )


def shape_of_megatron_args(args: Mapping[str, Any], vocab_rows: int, where: Path | str) -> ModelShape:
    """Shape from the arguments that a Megatron run saved in the checkpoint `where`.

    Raises UserError for what is not GPTBigCode (a gated activation, experts), missing or malformed.

    The activation is StarCoder's tanh GELU, unless `ACTIVATION_ARG` overrides it. On merging,
    checkpoint tools set `bias_gelu_fusion=False`, Megatron's exact GELU, but the weights were
    trained with tanh.
    """
    where = f"{where}: arguments"
    for name, allowed, what in (
        ("glu_activation", (None,), "a gated activation"),
        ("num_experts", (None, 0), "experts"),
        ("apply_residual_connection_post_layernorm", (None, False), "residuals after the layer norm"),
        ("swiglu", (None, False), "a gated activation"),
        ("untie_embeddings_and_output_weights", (None, False), "untied embeddings"),
    ):
        value = args.get(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise UserError(f"{where}: trained with {what} ({name}={shown(value)}); expected a GPTBigCode (StarCoder)")
    hidden = require(args, "hidden_size", int, where, low=1, high=MOST_WIDTH)
    heads = require(args, "num_attention_heads", int, where, low=1, high=MOST_WIDTH)
    check_heads(hidden, heads, f"{where}: hidden_size", "num_attention_heads")
    if "attention_head_type" in args:
        groups = 1 if args["attention_head_type"] == "multiquery" else heads
    else:
        grouped = optional(args, "group_query_attention", bool, where, False)
        groups = optional(args, "num_query_groups", int, where, heads) if grouped else heads
        if groups not in (1, heads):
            raise UserError(
                f"{where}: {groups} key/value heads for {heads} query heads; "
                "expected a GPTBigCode (StarCoder), which has one, or one per query head"
            )
    epsilon = "layernorm_epsilon" if "layernorm_epsilon" in args else "norm_epsilon"
    return ModelShape(
        num_layers=require(args, "num_layers", int, where, low=1, high=MOST_LAYERS),
        hidden_size=hidden,
        num_attention_heads=heads,
        max_position_embeddings=require(args, "max_position_embeddings", int, where, low=1, high=MOST_ROWS),
        vocab_size=vocab_rows,
        ffn_hidden_size=optional(args, "ffn_hidden_size", int, where, 0, low=0, high=MOST_WIDTH),
        num_query_groups=groups,
        layernorm_epsilon=given(args, epsilon, float, where, 1e-5),
        init_method_std=given(args, "init_method_std", float, where, 0.02),
        hidden_dropout=optional(args, "hidden_dropout", float, where, 0.1, low=0, high=1),
        attention_dropout=optional(args, "attention_dropout", float, where, 0.1, low=0, high=1),
        exact_gelu=str(args.get(ACTIVATION_ARG)) in EXACT_GELU,
    )


# Published architecture numbers: the models' Hugging Face configurations and BigCode's pre-training
# scripts (initializer_range). `tiny` is ours, for demonstrations and tests on a CPU; its tokenizer
# sets the vocabulary.
_PRESETS = {
    "starcoderbase": ModelShape(
        num_layers=40, hidden_size=6144, num_attention_heads=48, max_position_embeddings=8192, init_method_std=0.01275
    ),
    "starcoderbase-7b": ModelShape(
        num_layers=42, hidden_size=4096, num_attention_heads=32, max_position_embeddings=8192, init_method_std=0.015625
    ),
    "starcoderbase-3b": ModelShape(
        num_layers=36, hidden_size=2816, num_attention_heads=22, max_position_embeddings=8192, init_method_std=0.01884
    ),
    "starcoderbase-1b": ModelShape(
        num_layers=24, hidden_size=2048, num_attention_heads=16, max_position_embeddings=8192, init_method_std=0.02209
    ),
    "granite-20b": ModelShape(num_layers=52, hidden_size=6144, num_attention_heads=48, max_position_embeddings=8192),
    "granite-34b": ModelShape(num_layers=88, hidden_size=6144, num_attention_heads=48, max_position_embeddings=8192),
    "santacoder": ModelShape(
        num_layers=24, hidden_size=2048, num_attention_heads=16, max_position_embeddings=2048, vocab_size=49280
    ),
    "tiny": ModelShape(
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=1024,
        vocab_size=2048,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
}

GPT_BIGCODE = Family(
    model_type="gpt_bigcode",
    title="GPTBigCode",
    models="StarCoder, SantaCoder, Granite 20B and 34B",
    architecture="GPTBigCodeForCausalLM",
    read_config=_read_config,
    write_config=_write_config,
    notices=_notices,
    check=_check,
    prefix="transformer.",
    modules={
        "word_embeddings": ("transformer.wte",),
        "position_embeddings": ("transformer.wpe",),
        "input_layernorm": ("transformer.h.{}.ln_1",),
        "linear_qkv": ("transformer.h.{}.attn.c_attn",),
        "linear_proj": ("transformer.h.{}.attn.c_proj",),
        "pre_mlp_layernorm": ("transformer.h.{}.ln_2",),
        "linear_fc1": ("transformer.h.{}.mlp.c_fc",),
        "linear_fc2": ("transformer.h.{}.mlp.c_proj",),
        "final_layernorm": ("transformer.ln_f",),
        "output_layer": ("lm_head",),
    },
    presets=_PRESETS,
)
