"""The GPTBigCode family: architecture numbers of the published models, and their configurations.

There is one table of models (`PRESETS`) and one class for a model's shape (`ModelShape`): the flags
take their defaults from it, the engine builds the model from it, conversion writes config.json.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ft.errors import UserError

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three spellings of it in transformers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a GPTBigCode model. Raises UserError, naming the flags, when heads do not divide it.

    `vocab_size` is the tokenizer's (unpadded) number of embedding rows.
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
            "activation_function": "gelu_pytorch_tanh",
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
    def from_hf_config(cls, config: dict, where: str) -> "ModelShape":
        """Shape of a GPTBigCode config.json, which is at `where`.

        Raises UserError, naming that file and the field, for what is missing or malformed and for
        what Megatron's GPTBigCode cannot express.
        """
        if config.get("model_type") != "gpt_bigcode":
            raise UserError(
                f"{where}: model_type is {config.get('model_type')!r}, expected 'gpt_bigcode' (StarCoder, SantaCoder)"
            )
        activation = config.get("activation_function", "gelu_pytorch_tanh")
        if activation not in _TANH_GELU:
            raise UserError(
                f"{where}: activation_function is {activation!r}, expected the tanh GELU 'gelu_pytorch_tanh'"
            )
        if not config.get("scale_attn_weights", True) or not config.get("tie_word_embeddings", True):
            raise UserError(f"{where}: scale_attn_weights and tie_word_embeddings must be true, as in every StarCoder")
        if config.get("embd_pdrop", 0.1) != config.get("resid_pdrop", 0.1):
            raise UserError(
                f"{where}: embd_pdrop and resid_pdrop differ; Megatron has one hidden dropout, give them one value"
            )

        def count(name: str) -> int:
            value = config.get(name)
            if type(value) is not int or value < 1:
                found = f"is {value!r}" if name in config else "is missing"
                raise UserError(f"{where}: {name} {found}, expected a positive integer; copy the file again")
            return value

        def number(name: str, default: float) -> float:
            value = config.get(name, default)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise UserError(f"{where}: {name} is {value!r}, expected a number, at least 0")
            return value

        multi_query = config.get("multi_query", True)
        if type(multi_query) is not bool:
            raise UserError(f"{where}: multi_query is {multi_query!r}, expected true or false")
        hidden, heads = count("n_embd"), count("n_head")
        _check_heads(hidden, heads, f"{where}: n_embd", "n_head")
        return cls(
            num_layers=count("n_layer"),
            hidden_size=hidden,
            num_attention_heads=heads,
            max_position_embeddings=count("n_positions"),
            vocab_size=count("vocab_size"),
            ffn_hidden_size=0 if config.get("n_inner") is None else count("n_inner"),
            multi_query=multi_query,
            layernorm_epsilon=number("layer_norm_epsilon", 1e-5),
            init_method_std=number("initializer_range", 0.02),
            hidden_dropout=number("resid_pdrop", 0.1),
            attention_dropout=number("attn_pdrop", 0.1),
        )

    @classmethod
    def from_megatron_args(cls, args: dict, vocab_rows: int, where: Path | str) -> "ModelShape":
        """Shape from the arguments that a Megatron run saved in the checkpoint `where`.

        Raises UserError for what is not GPTBigCode (a gated activation, experts) or is missing.

        The activation is always StarCoder's tanh GELU. On merging, checkpoint tools set
        `bias_gelu_fusion=False`, Megatron's exact GELU, but the weights were trained with tanh.
        """
        for name, allowed, what in (
            ("glu_activation", (None,), "a gated activation"),
            ("num_experts", (None, 0), "experts"),
            ("apply_residual_connection_post_layernorm", (None, False), "residuals after the layer norm"),
            ("swiglu", (None, False), "a gated activation"),
            ("untie_embeddings_and_output_weights", (None, False), "untied embeddings"),
        ):
            if args.get(name) not in allowed:
                raise UserError(
                    f"{where}: trained with {what} ({name}={args[name]!r}); expected a GPTBigCode (StarCoder)"
                )
        try:
            hidden, heads = args["hidden_size"], args["num_attention_heads"]
            _check_heads(hidden, heads, f"{where}: hidden_size", "num_attention_heads")
            if "attention_head_type" in args:
                multi_query = args["attention_head_type"] == "multiquery"
            else:
                groups = args.get("num_query_groups") if args.get("group_query_attention") else heads
                multi_query = groups == 1
                if groups not in (1, heads):
                    raise UserError(
                        f"{where}: {groups} key/value heads for {heads} query heads; "
                        "expected a GPTBigCode (StarCoder), which has one, or one per query head"
                    )
            return cls(
                num_layers=args["num_layers"],
                hidden_size=hidden,
                num_attention_heads=heads,
                max_position_embeddings=args["max_position_embeddings"],
                vocab_size=vocab_rows,
                ffn_hidden_size=args.get("ffn_hidden_size") or 0,
                multi_query=multi_query,
                layernorm_epsilon=args.get("layernorm_epsilon", args.get("norm_epsilon", 1e-5)),
                init_method_std=args.get("init_method_std", 0.02),
                hidden_dropout=args.get("hidden_dropout", 0.1),
                attention_dropout=args.get("attention_dropout", 0.1),
            )
        except KeyError as error:
            raise UserError(f"{where}: its arguments lack {error}, expected those of a Megatron GPT run") from None

    def as_dict(self) -> dict:
        """Plain fields, for manifests; `ModelShape(**fields)` is the inverse."""
        return asdict(self)

    def with_vocab(self, vocab_size: int) -> "ModelShape":
        """The same model for a tokenizer of another size."""
        return replace(self, vocab_size=vocab_size)


def _check_heads(hidden_size: int, heads: int, hidden_name: str, heads_name: str) -> None:
    if hidden_size % heads:
        raise UserError(
            f"{hidden_name} {hidden_size} is not divisible by {heads_name} {heads}; "
            "choose a number of heads that divides it"
        )


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
