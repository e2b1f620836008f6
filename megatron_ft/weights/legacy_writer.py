"""Write a checkpoint of Megatron before Core, as BigCode's mtf branch loads it, from any source.

    DIR/latest_checkpointed_iteration.txt    "release": weights only, training starts at iteration 0
    DIR/release/mp_rank_TT[_PPP]/model_optim_rng.pt
                                 model_rng.pt -> model_optim_rng.pt
    DIR/release/mp_rank_TT[_PPP]_DDD/optim.pt

The last two are for --use-distributed-optimizer, which looks for the weights under the name
model_rng.pt and opens optim.pt (here empty) before it knows that there is no optimizer state.
Tensors are streamed: a block of rows is in memory at a time.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ft.model.boxes import Box, part, shard
from megatron_ft.model.family import activation_of
from megatron_ft.model.gpt_bigcode import ACTIVATION_ARG
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import LAYER, WHOLE, Weight, tensor_shape
from megatron_ft.weights.directory import TRACKER
from megatron_ft.weights.hf_config import SPECIAL_IDS_ARG
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks, nbytes


def legacy_args(
    shape: ModelShape,
    dtype: torch.dtype,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    padded_vocab: int,
    divisible_by: int,
    special_ids: Mapping[str, int | None],
) -> argparse.Namespace:
    """Arguments that the branch reads from a checkpoint, or compares with its own on loading.

    Two are ours, for conversion to Hugging Face: the exact GELU, if the model's configuration has
    it, and the special tokens' ids.
    """
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        kv_channels=shape.kv_channels,
        attention_head_type="multiquery" if shape.multi_query else "multihead",
        max_position_embeddings=shape.max_position_embeddings,
        seq_length=shape.max_position_embeddings,
        encoder_seq_length=shape.max_position_embeddings,
        layernorm_epsilon=shape.layernorm_epsilon,
        init_method_std=shape.init_method_std,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        make_vocab_size_divisible_by=divisible_by,
        padded_vocab_size=padded_vocab,
        tokenizer_type="TokenizerFromFile",
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        data_parallel_random_init=False,
        bias_gelu_fusion=not shape.exact_gelu,  # Megatron's fused kernel is the tanh approximation
        apply_residual_connection_post_layernorm=False,
        glu_activation=None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        iteration=0,
        **({ACTIVATION_ARG: activation_of(shape)} if shape.exact_gelu else {}),
        **({SPECIAL_IDS_ARG: dict(special_ids)} if special_ids else {}),
    )


def legacy_bytes(
    source: WeightSource, dtype: torch.dtype, *, tensor_parallel: int, pipeline_parallel: int, padded_vocab: int
) -> int:
    """Bytes of weights that `write_legacy` will write, replicas counted each time."""
    return sum(
        nbytes(dtype, tensor.shape)
        for stage in range(pipeline_parallel)
        for rank in range(tensor_parallel)
        for tensor in _flat(_model(_Rank(source, dtype, rank, tensor_parallel, stage, pipeline_parallel, padded_vocab)))
    )


def write_legacy(
    source: WeightSource,
    directory: Path,
    *,
    dtype: torch.dtype,
    tensor_parallel: int,
    pipeline_parallel: int,
    padded_vocab: int,
    divisible_by: int,
    optim_ranks: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `directory` (which exists, empty) in `dtype`, with `padded_vocab` embedding rows.

    The layout must divide the shape (`ModelShape.check_layout`). `divisible_by` is recorded as
    make_vocab_size_divisible_by. `optim_ranks` is the number of data-parallel ranks that need an
    empty optim.pt. `advance(n)` is called after each block of n bytes. Raises UserError for a value
    that does not fit in `dtype`, and for a source that is damaged.
    """
    args = legacy_args(
        source.shape, dtype, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
        padded_vocab=padded_vocab, divisible_by=divisible_by, special_ids=source.special_ids,
    )  # fmt: skip
    for stage in range(pipeline_parallel):
        for rank in range(tensor_parallel):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline_parallel > 1 else "")
            place = directory / "release" / name
            place.mkdir(parents=True)
            model = _model(_Rank(source, dtype, rank, tensor_parallel, stage, pipeline_parallel, padded_vocab))
            with (place / "model_optim_rng.pt").open("wb") as file:
                write_pt(file, {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}, advance)
            (place / "model_rng.pt").symlink_to("model_optim_rng.pt")
            for data_rank in range(optim_ranks):
                optimizer = directory / "release" / f"{name}_{data_rank:03d}"
                optimizer.mkdir()
                torch.save({}, optimizer / "optim.pt")
    (directory / TRACKER).write_text("release", encoding="utf-8")


class _Rank(NamedTuple):
    """One rank of the layout, and what its tensors are made from."""

    source: WeightSource
    dtype: torch.dtype
    rank: int
    tensor_parallel: int
    stage: int
    pipeline_parallel: int
    padded_vocab: int

    def shard(self, weight: Weight, prefix: str = "") -> LazyTensor:
        """This rank's part of a tensor; `prefix` is its layer's."""
        name = prefix + weight.core
        shape = tensor_shape(self.source.shape.with_vocab(self.padded_vocab), name)
        return self._lazy(name, shard(shape, weight, self.rank, self.tensor_parallel))

    def rows(self, name: str, first: int, count: int) -> LazyTensor:
        """Some rows of a tensor."""
        return self._lazy(name, part(tensor_shape(self.source.shape, name), 0, first, count))

    def _lazy(self, name: str, box: Box) -> LazyTensor:
        return LazyTensor(self.dtype, box.sizes, partial(box_blocks, self.source, name, self.dtype, box))


def _model(one: _Rank) -> dict:
    """The tree of tensors of one rank.

    The first stage has the embeddings, the last the final norm and the tied copy of the word
    embeddings. Multi-query attention stores a rank's queries, and the keys and values that are the
    same on all ranks, as two tensors.
    """
    shape = one.source.shape
    word_embeddings, positions, norm_weight, norm_bias, _ = WHOLE
    language_model: dict = {}
    if one.stage == 0:
        language_model["embedding"] = {
            "word_embeddings": {"weight": one.shard(word_embeddings)},
            "position_embeddings": {"weight": one.shard(positions)},
        }
    encoder: dict[str, LazyTensor] = {}
    queries = shape.hidden_size  # rows of them
    own_queries = queries // one.tensor_parallel
    per_stage = shape.num_layers // one.pipeline_parallel
    for layer in range(per_stage):
        prefix = f"decoder.layers.{one.stage * per_stage + layer}."
        for weight in LAYER:
            key = f"layers.{layer}.{weight.legacy}"
            if shape.multi_query and "query_key_value" in key:
                name = prefix + weight.core
                encoder[key.replace("query_key_value", "query")] = one.rows(name, one.rank * own_queries, own_queries)
                encoder[key.replace("query_key_value", "key_value")] = one.rows(name, queries, shape.qkv_rows - queries)
            else:
                encoder[key] = one.shard(weight, prefix)
    if one.stage == one.pipeline_parallel - 1:
        encoder["final_layernorm.weight"] = one.shard(norm_weight)
        encoder["final_layernorm.bias"] = one.shard(norm_bias)
    language_model["encoder"] = encoder
    model = {"language_model": language_model}
    if one.pipeline_parallel > 1 and one.stage == one.pipeline_parallel - 1:
        model["word_embeddings_for_head"] = {"weight": one.shard(word_embeddings)}
    return model


def _flat(tree: dict) -> list[LazyTensor]:
    return [leaf for value in tree.values() for leaf in (_flat(value) if isinstance(value, dict) else [value])]
