"""Write a checkpoint of Megatron before Core, as BigCode's mtf branch loads it, from any source, streaming.

DIR/latest_checkpointed_iteration.txt    "release": weights alone, training starts at iteration 0
DIR/release/mp_rank_TT[_PPP]/model_optim_rng.pt
                             model_rng.pt -> model_optim_rng.pt    the name that --use-distributed-optimizer looks for
DIR/release/mp_rank_TT[_PPP]_DDD/optim.pt                          empty; the branch opens it before it finds out
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_ft.model.boxes import part, shard
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import LAYER, WHOLE, Weight, hf_shape
from megatron_ft.weights.directory import TRACKER
from megatron_ft.weights.pt_writer import LazyTensor, write_pt
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.tensor_blocks import box_blocks, nbytes


def legacy_args(
    shape: ModelShape, dtype: torch.dtype, tp: int, pp: int, padded_vocab: int, divisible_by: int
) -> argparse.Namespace:
    """Arguments that the branch reads from a checkpoint, or compares with its own on loading."""
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
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        data_parallel_random_init=False,
        bias_gelu_fusion=True,
        apply_residual_connection_post_layernorm=False,
        glu_activation=None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        iteration=0,
    )


def legacy_bytes(source: WeightSource, dtype: torch.dtype, tp: int, pp: int, padded_vocab: int) -> int:
    """Bytes of weights that `write_legacy` will write, replicas counted as often as they are stored."""
    return sum(
        nbytes(dtype, tensor.shape)
        for stage in range(pp)
        for rank in range(tp)
        for tensor in _flat(_model(source, dtype, rank, tp, stage, pp, padded_vocab))
    )


def write_legacy(
    source: WeightSource,
    directory: Path,
    *,
    dtype: torch.dtype,
    tp: int,
    pp: int,
    padded_vocab: int,
    divisible_by: int,
    optim_ranks: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `directory` (which exists, empty). `optim_ranks` data-parallel ranks find the empty optim.pt that
    the branch wants with --use-distributed-optimizer. Layouts must divide the shape (`ModelShape.check_layout`)."""
    args = legacy_args(source.shape, dtype, tp, pp, padded_vocab, divisible_by)
    for stage in range(pp):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            place = directory / "release" / name
            place.mkdir(parents=True)
            model = _model(source, dtype, rank, tp, stage, pp, padded_vocab)
            with (place / "model_optim_rng.pt").open("wb") as file:
                write_pt(file, {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}, advance)
            (place / "model_rng.pt").symlink_to("model_optim_rng.pt")
            for data_rank in range(optim_ranks):
                beside = directory / "release" / f"{name}_{data_rank:03d}"
                beside.mkdir()
                torch.save({}, beside / "optim.pt")
    (directory / TRACKER).write_text("release")


def _model(
    source: WeightSource, dtype: torch.dtype, rank: int, tp: int, stage: int, pp: int, padded_vocab: int
) -> dict:
    """The tree of tensors of one rank: embeddings on the first stage, the final norm and the tied copy on the last."""
    lazy = partial(_shard, source, dtype, rank, tp, padded_vocab)
    word_embeddings, positions, norm_weight, norm_bias = WHOLE
    language_model: dict = {}
    if stage == 0:
        language_model["embedding"] = {
            "word_embeddings": {"weight": lazy(word_embeddings, "")},
            "position_embeddings": {"weight": lazy(positions, "")},
        }
    encoder: dict[str, LazyTensor] = {}
    queries = source.shape.hidden_size  # rows of them
    per_stage = source.shape.num_layers // pp
    for layer in range(per_stage):
        hf_prefix = f"transformer.h.{stage * per_stage + layer}."
        for weight in LAYER:
            key = f"layers.{layer}.{weight.legacy}"
            if source.shape.multi_query and "query_key_value" in key:
                rows = partial(_rows, source, dtype, hf_prefix + weight.hf)
                encoder[key.replace("query_key_value", "query")] = rows(rank * queries // tp, queries // tp)
                encoder[key.replace("query_key_value", "key_value")] = rows(queries, source.shape.qkv_rows - queries)
            else:
                encoder[key] = lazy(weight, hf_prefix)
    if stage == pp - 1:
        encoder["final_layernorm.weight"] = lazy(norm_weight, "")
        encoder["final_layernorm.bias"] = lazy(norm_bias, "")
    language_model["encoder"] = encoder
    model = {"language_model": language_model}
    if pp > 1 and stage == pp - 1:
        model["word_embeddings_for_head"] = {"weight": lazy(word_embeddings, "")}
    return model


def _shard(
    source: WeightSource, dtype: torch.dtype, rank: int, tp: int, padded_vocab: int, weight: Weight, hf_prefix: str
) -> LazyTensor:
    """One tensor-parallel rank's part."""
    name = hf_prefix + weight.hf
    box = shard(hf_shape(source.shape.with_vocab(padded_vocab), name), weight, rank, tp)
    return LazyTensor(dtype, box.sizes, partial(box_blocks, source, name, dtype, box))


def _rows(source: WeightSource, dtype: torch.dtype, name: str, first: int, count: int) -> LazyTensor:
    """Rows of query-key-value: multi-query attention stores a rank's queries, and keys and values, as tensors of their own."""
    box = part(hf_shape(source.shape, name), 0, first, count)
    return LazyTensor(dtype, box.sizes, partial(box_blocks, source, name, dtype, box))


def _flat(tree: dict) -> list[LazyTensor]:
    return [leaf for value in tree.values() for leaf in (_flat(value) if isinstance(value, dict) else [value])]
