"""The numbers that describe a model: `ModelShape`, of which flags, engine and formats are made.

Which of them a family of models has, and how transformers writes them, is in the family's own file
(gpt_bigcode.py, starcoder2.py); families.py has the table of families and presets.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import require

# Limits of what a file may claim, far above any model: names and sizes are computed from it.
MOST_LAYERS, MOST_WIDTH, MOST_ROWS = 10_000, 1 << 20, 1 << 31
# Fields that manifests leave out at their defaults, as versions did that knew only GPTBigCode.
_LATER = ("family", "rotary_base", "window_size", "untie_embeddings_and_output_weights", "exact_gelu")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a model. Raises UserError, naming the flags, when heads do not divide it.

    `family` is a key of `families.FAMILIES`. `vocab_size` is the tokenizer's (unpadded) number of
    embedding rows. `exact_gelu`: the activation is GELU itself and not its tanh approximation, with
    which StarCoder was trained.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int = 49152
    ffn_hidden_size: int = 0  # 0: 4 x hidden_size, as in every published StarCoder
    num_query_groups: int = 1  # key/value heads, which divide the query heads among them
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    family: str = "gpt_bigcode"
    rotary_base: float = 0.0  # of rotary positions; 0: learned positions
    window_size: int = 0  # tokens that a token sees, itself and those before it; 0: all
    untie_embeddings_and_output_weights: bool = False
    exact_gelu: bool = False

    def __post_init__(self) -> None:
        if not self.ffn_hidden_size:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        check_heads(self.hidden_size, self.num_attention_heads, "--hidden-size", "--num-attention-heads")
        if self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"--num-query-groups {self.num_query_groups} does not divide the {self.num_attention_heads} "
                "attention heads; choose a number of key/value heads that does"
            )

    @property
    def kv_channels(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def multi_query(self) -> bool:
        """Whether all query heads share one key/value head."""
        return self.num_query_groups == 1

    @property
    def attention(self) -> str:
        """The kind of attention, for people."""
        if self.multi_query:
            return "multi-query"
        return "multi-head" if self.num_query_groups == self.num_attention_heads else "grouped-query"

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query-key-value weight [rows, hidden_size]."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def learned_positions(self) -> bool:
        """Whether positions are a table of embeddings; otherwise they rotate queries and keys."""
        return not self.rotary_base

    def num_parameters(self, padded_vocab_size: int | None = None) -> int:
        """Number of parameters, with tied embeddings counted once.

        The vocabulary is unpadded unless a padded size is given.
        """
        h, f = self.hidden_size, self.ffn_hidden_size
        layer = 4 * h + (self.qkv_rows * h + self.qkv_rows) + (h * h + h) + (f * h + f) + (h * f + h)
        rows = (padded_vocab_size or self.vocab_size) * (2 if self.untie_embeddings_and_output_weights else 1)
        rows += self.max_position_embeddings if self.learned_positions else 0
        return rows * h + self.num_layers * layer + 2 * h

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
        if not self._divides_heads(tp):
            groups = f" in {self.num_query_groups} groups" if self.attention == "grouped-query" else ""
            legal = [n for n in range(1, heads + 1) if self._divides_heads(n) and self.qkv_rows % n == 0]
            raise UserError(
                f"{tensor_flag} {tp} does not divide the {heads} attention heads{groups}; use one of {legal}"
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

    def _divides_heads(self, tensor_parallel: int) -> bool:
        """Whether each rank has complete heads, of complete groups or of one."""
        groups = self.num_query_groups
        groups_fit = groups % tensor_parallel == 0 or tensor_parallel % groups == 0
        return self.num_attention_heads % tensor_parallel == 0 and groups_fit

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], where: str) -> "ModelShape":
        """The inverse of `as_dict`, for a manifest at `where`.

        A field with a default may be missing. Raises UserError for any other difference.
        """
        known = {field.name: field for field in fields(cls)}
        if unknown := [name for name in found if name not in known and name != "multi_query"]:
            raise UserError(f"{where}: unknown field {unknown[0]!r}; a newer megatron-ft may have written it")
        limits = {"num_layers": MOST_LAYERS, "vocab_size": MOST_ROWS, "max_position_embeddings": MOST_ROWS}
        limits |= {"rotary_base": 1 << 62, "window_size": MOST_ROWS}
        values: dict[str, Any] = {}
        for name, field in known.items():
            if name not in found and field.default is not MISSING:
                continue
            assert isinstance(field.type, type)
            low = 1 if field.type is int and name not in ("ffn_hidden_size", "window_size") else 0
            high = limits.get(name, MOST_WIDTH)
            values[name] = require(found, name, field.type, where, low=low, high=high)
        heads = values["num_attention_heads"]
        check_heads(values["hidden_size"], heads, f"{where}: hidden_size", "num_attention_heads")
        if "multi_query" in found:
            values["num_query_groups"] = 1 if require(found, "multi_query", bool, where) else heads
        if heads % values.get("num_query_groups", 1):
            raise UserError(f"{where}: num_query_groups {values['num_query_groups']} does not divide the {heads} heads")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for manifests; `from_dict` is the inverse.

        A GPTBigCode's are those of older versions, which can read them.
        """
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in _LATER or getattr(self, field.name) != field.default
        }
        if self.num_query_groups in (1, self.num_attention_heads):
            del found["num_query_groups"]
            found["multi_query"] = self.multi_query
        return found

    def with_vocab(self, vocab_size: int) -> "ModelShape":
        """The same model for a tokenizer of another size."""
        return replace(self, vocab_size=vocab_size)


def check_heads(hidden_size: int, heads: int, hidden_name: str, heads_name: str) -> None:
    """Raise UserError, with the names that both were given under, unless heads divide the width."""
    if hidden_size % heads:
        raise UserError(
            f"{hidden_name} {hidden_size} is not divisible by {heads_name} {heads}; "
            "choose a number of heads that divides it"
        )


def padded_vocab_size(vocab_size: int, make_divisible_by: int, tensor_parallel: int) -> int:
    """Embedding rows after padding to a multiple of `make_divisible_by` x `tensor_parallel`."""
    multiple = make_divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple
