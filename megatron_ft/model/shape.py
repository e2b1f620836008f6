"""The GPTBigCode family: architecture numbers of the published models, and their configurations.

There is one table of models (`PRESETS`) and one class for a model's shape (`ModelShape`): the flags
take their defaults from it, the engine builds the model from it, conversion writes config.json.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import kind_of, optional, require

# Names in transformers of StarCoder's GELU, the tanh approximation, and of the exact one.
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate")
EXACT_GELU = ("gelu", "gelu_python")
# Our own argument in a Megatron checkpoint that was converted from a model with the exact GELU.
ACTIVATION_ARG = "hf_activation_function"
# Limits of what a file may claim, far above any model: names and sizes are computed from it.
MOST_LAYERS, MOST_WIDTH, MOST_ROWS = 10_000, 1 << 20, 1 << 31

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a GPTBigCode model. Raises UserError, naming the flags, when heads do not divide it.

    `vocab_size` is the tokenizer's (unpadded) number of embedding rows. `exact_gelu`: the
    activation is GELU itself and not its tanh approximation, with which StarCoder was trained.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int = 49152
    ffn_hidden_size: int = 0  # 0: 4 x hidden_size, as in every published StarCoder
    multi_query: bool = True
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    exact_gelu: bool = False

    def __post_init__(self) -> None:
        if not self.ffn_hidden_size:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        _check_heads(self.hidden_size, self.num_attention_heads, "--hidden-size", "--num-attention-heads")

    @property
    def kv_channels(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_query_groups(self) -> int:
        """Key/value heads: 1 with multi-query attention, else one per query head."""
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query-key-value weight [rows, hidden_size]."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def activation(self) -> str:
        """transformers' name of the activation."""
        return EXACT_GELU[0] if self.exact_gelu else TANH_GELU[0]

    def num_parameters(self, padded_vocab_size: int | None = None) -> int:
        """Number of parameters, with tied embeddings counted once.

        The vocabulary is unpadded unless a padded size is given.
        """
        h, f = self.hidden_size, self.ffn_hidden_size
        layer = 4 * h + (self.qkv_rows * h + self.qkv_rows) + (h * h + h) + (f * h + f) + (h * f + h)
        return (
            ((padded_vocab_size or self.vocab_size) + self.max_position_embeddings) * h
            + self.num_layers * layer
            + 2 * h
        )

    def check_layout(
        self,
        tensor_parallel: int,
        pipeline_parallel: int,
        *,
        tensor_flag: str = "--tensor-model-parallel-size",
        pipeline_flag: str = "--pipeline-model-parallel-size",
    ) -> None:
        """Raise UserError, naming the flag, when the layout does not divide this shape.

        These are Megatron-Core's own rules, checked before anything is started.
        """
        heads, tp, pp = self.num_attention_heads, tensor_parallel, pipeline_parallel
        if heads % tp:
            raise UserError(
                f"{tensor_flag} {tp} does not divide the {heads} attention heads; "
                f"use one of {[n for n in range(1, heads + 1) if heads % n == 0 and self.qkv_rows % n == 0]}"
            )
        if self.qkv_rows % tp or self.ffn_hidden_size % tp:
            raise UserError(
                f"{tensor_flag} {tp} does not divide the {self.qkv_rows} query-key-value rows and "
                f"{self.ffn_hidden_size} feed-forward channels; choose a smaller power of two"
            )
        if self.num_layers % pp:
            raise UserError(
                f"{pipeline_flag} {pp} does not divide the {self.num_layers} layers; "
                f"use one of {[n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0]}"
            )

    def to_hf_config(self) -> dict:
        """Fields of a transformers GPTBigCodeConfig for this shape, without special token ids."""
        return {
            "architectures": ["GPTBigCodeForCausalLM"],
            "model_type": "gpt_bigcode",
            "activation_function": self.activation,
            "attention_softmax_in_fp32": True,
            "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True,
            "attn_pdrop": self.attention_dropout,
            "embd_pdrop": self.hidden_dropout,
            "resid_pdrop": self.hidden_dropout,
            "initializer_range": self.init_method_std,
            "layer_norm_epsilon": self.layernorm_epsilon,
            "multi_query": self.multi_query,
            "n_embd": self.hidden_size,
            "n_head": self.num_attention_heads,
            "n_inner": self.ffn_hidden_size,
            "n_layer": self.num_layers,
            "n_positions": self.max_position_embeddings,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": True,
            "use_cache": True,
        }

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str) -> "ModelShape":
        """Shape of a GPTBigCode config.json, which is at `where`.

        Raises UserError, naming that file and the field, for what is missing or malformed and for
        what Megatron's GPTBigCode cannot express.
        """
        if config.get("model_type") != "gpt_bigcode":
            found = config.get("model_type", "missing")
            raise UserError(
                f"{where}: model_type is {found if found == 'missing' else _shown(found)}, "
                "expected 'gpt_bigcode' (StarCoder, SantaCoder)"
            )
        activation = config.get("activation_function", TANH_GELU[0])
        if activation not in (*TANH_GELU, *EXACT_GELU):
            raise UserError(
                f"{where}: activation_function is {_shown(activation)}, "
                f"expected the tanh GELU {TANH_GELU[0]!r} or the exact one, {EXACT_GELU[0]!r}"
            )
        for name in ("scale_attn_weights", "tie_word_embeddings"):
            if not _given(config, name, bool, where, True):
                raise UserError(f"{where}: {name} is false, expected true, as in every StarCoder")
        dropout = _given(config, "resid_pdrop", float, where, 0.1, high=1)
        if dropout != _given(config, "embd_pdrop", float, where, 0.1, high=1):
            raise UserError(
                f"{where}: embd_pdrop and resid_pdrop differ; Megatron has one hidden dropout, give them one value"
            )
        hidden = require(config, "n_embd", int, where, low=1, high=MOST_WIDTH)
        heads = require(config, "n_head", int, where, low=1, high=MOST_WIDTH)
        _check_heads(hidden, heads, f"{where}: n_embd", "n_head")
        return cls(
            num_layers=require(config, "n_layer", int, where, low=1, high=MOST_LAYERS),
            hidden_size=hidden,
            num_attention_heads=heads,
            max_position_embeddings=require(config, "n_positions", int, where, low=1, high=MOST_ROWS),
            vocab_size=require(config, "vocab_size", int, where, low=1, high=MOST_ROWS),
            ffn_hidden_size=optional(config, "n_inner", int, where, 0, low=1, high=MOST_WIDTH),
            multi_query=_given(config, "multi_query", bool, where, True),
            layernorm_epsilon=_given(config, "layer_norm_epsilon", float, where, 1e-5),
            init_method_std=_given(config, "initializer_range", float, where, 0.02),
            hidden_dropout=dropout,
            attention_dropout=_given(config, "attn_pdrop", float, where, 0.1, high=1),
            exact_gelu=activation in EXACT_GELU,
        )

    @classmethod
    def from_megatron_args(cls, args: Mapping[str, Any], vocab_rows: int, where: Path | str) -> "ModelShape":
        """Shape from the arguments that a Megatron run saved in the checkpoint `where`.

        Raises UserError for what is not GPTBigCode (a gated activation, experts), missing or
        malformed.

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
                raise UserError(
                    f"{where}: trained with {what} ({name}={_shown(value)}); expected a GPTBigCode (StarCoder)"
                )
        hidden = require(args, "hidden_size", int, where, low=1, high=MOST_WIDTH)
        heads = require(args, "num_attention_heads", int, where, low=1, high=MOST_WIDTH)
        _check_heads(hidden, heads, f"{where}: hidden_size", "num_attention_heads")
        if "attention_head_type" in args:
            multi_query = args["attention_head_type"] == "multiquery"
        else:
            grouped = optional(args, "group_query_attention", bool, where, False)
            groups = optional(args, "num_query_groups", int, where, heads) if grouped else heads
            multi_query = groups == 1
            if groups not in (1, heads):
                raise UserError(
                    f"{where}: {groups} key/value heads for {heads} query heads; "
                    "expected a GPTBigCode (StarCoder), which has one, or one per query head"
                )
        epsilon = "layernorm_epsilon" if "layernorm_epsilon" in args else "norm_epsilon"
        return cls(
            num_layers=require(args, "num_layers", int, where, low=1, high=MOST_LAYERS),
            hidden_size=hidden,
            num_attention_heads=heads,
            max_position_embeddings=require(args, "max_position_embeddings", int, where, low=1, high=MOST_ROWS),
            vocab_size=vocab_rows,
            ffn_hidden_size=optional(args, "ffn_hidden_size", int, where, 0, low=0, high=MOST_WIDTH),
            multi_query=multi_query,
            layernorm_epsilon=_given(args, epsilon, float, where, 1e-5),
            init_method_std=_given(args, "init_method_std", float, where, 0.02),
            hidden_dropout=optional(args, "hidden_dropout", float, where, 0.1, low=0, high=1),
            attention_dropout=optional(args, "attention_dropout", float, where, 0.1, low=0, high=1),
            exact_gelu=str(args.get(ACTIVATION_ARG)) in EXACT_GELU,
        )

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], where: str) -> "ModelShape":
        """The inverse of `as_dict`, for a manifest at `where`.

        A field with a default may be missing. Raises UserError for any other difference.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := [name for name in found if name not in known]:
            raise UserError(f"{where}: unknown field {unknown[0]!r}; a newer megatron-ft may have written it")
        limits = {"num_layers": MOST_LAYERS, "vocab_size": MOST_ROWS, "max_position_embeddings": MOST_ROWS}
        values: dict[str, Any] = {}
        for name, field in known.items():
            if name not in found and field.default is not MISSING:
                continue
            assert isinstance(field.type, type)
            low = 1 if field.type is int and name != "ffn_hidden_size" else 0
            high = limits.get(name, MOST_WIDTH)
            values[name] = require(found, name, field.type, where, low=low, high=high)
        _check_heads(
            values["hidden_size"], values["num_attention_heads"], f"{where}: hidden_size", "num_attention_heads"
        )
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for manifests; `from_dict` is the inverse.

        Without `exact_gelu` where it is false, as older versions write them.
        """
        found = asdict(self)
        if not self.exact_gelu:
            del found["exact_gelu"]
        return found

    def with_vocab(self, vocab_size: int) -> "ModelShape":
        """The same model for a tokenizer of another size."""
        return replace(self, vocab_size=vocab_size)


def _check_heads(hidden_size: int, heads: int, hidden_name: str, heads_name: str) -> None:
    if hidden_size % heads:
        raise UserError(
            f"{hidden_name} {hidden_size} is not divisible by {heads_name} {heads}; "
            "choose a number of heads that divides it"
        )


def _given(found: Mapping[str, Any], name: str, kind: type[T], where: str, default: T, *, high: float = math.inf) -> T:
    """The value of `name`, at least 0; the default if there is none, an error if it is null."""
    return require(found, name, kind, where, low=0, high=high) if name in found else default


def _shown(value: object) -> str:
    return repr(value) if value is None or isinstance(value, str | bool | int | float) else kind_of(value)


def padded_vocab_size(vocab_size: int, make_divisible_by: int, tensor_parallel: int) -> int:
    """Embedding rows after padding to a multiple of `make_divisible_by` x `tensor_parallel`."""
    multiple = make_divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


# Published architecture numbers: the models' Hugging Face configurations and BigCode's pre-training
# scripts (initializer_range). `tiny` is ours, for demonstrations and tests on a CPU; its tokenizer
# sets the vocabulary.
PRESETS = {
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
