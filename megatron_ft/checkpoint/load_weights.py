"""Load the weights of any checkpoint into a Megatron-Core model, in any parallel layouts of both.

Every rank reads its own slices from the memory-mapped source: no rank needs memory for the full
model, and none sends to another.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_ft.errors import UserError
from megatron_ft.model.lora import is_trainable
from megatron_ft.model.tensor_names import VOCABULARY, name_of_parameter, tensor_shape, weight_of
from megatron_ft.weights.adapters import AdapterSource
from megatron_ft.weights.source import WeightSource

# Rows read at a time for an embedding's mean; fixed, so that all layouts sum in the same order.
MEAN_BLOCK = 4096


@dataclass
class LoadReport:
    """What `load_weights` did on this rank."""

    loaded: list[str] = field(default_factory=list)  # our names
    new_tokens: int = 0  # tokens that the source has no weights for
    zeroed_rows: int = 0  # vocabulary padding that the source does not have
    dropped_rows: int = 0  # vocabulary rows that the model does not have
    untouched: list[str] = field(default_factory=list)  # parameters that are not in the source

    def lines(self) -> list[str]:
        """For the log."""
        lines = [f"{len(set(self.loaded))} tensors loaded"]
        if self.new_tokens:
            lines.append(
                f"{self.new_tokens} new tokens without weights in the checkpoint start at the mean of its embedding rows"
            )
        if self.zeroed_rows:
            lines.append(f"{self.zeroed_rows} rows of vocabulary padding beyond the checkpoint's are zero")
        if self.dropped_rows:
            lines.append(f"{self.dropped_rows} vocabulary rows of the checkpoint are beyond the model's and left out")
        if self.untouched:
            lines.append(
                f"{len(self.untouched)} parameters are not in the checkpoint and keep their initial values "
                f"({self.untouched[0]} ...)"
            )
        return lines


def unwrap(module: Any) -> Any:
    """The GPTModel inside DistributedDataParallel and Float16Module (untyped in Megatron-Core)."""
    while hasattr(module, "module"):
        module = module.module
    return module


def known_tokens(source: WeightSource) -> int:
    """Tokens that the source has weights for: its rows, without padding if it records that."""
    return source.vocab_size or source.shape.vocab_size


@torch.no_grad()
def load_weights(source: WeightSource, model_chunks: Iterable[nn.Module], vocab_size: int | None = None) -> LoadReport:
    """Copy this rank's slices of `source` into its model chunks, in place, cast to their dtype.

    Of the model's vocabulary, `vocab_size` rows are tokens (None: as many as in the source). Tokens
    that the source has no weights for start at the mean of those it has (of embeddings, and of an
    untied output layer), the same in every layout; padding beyond the source's rows becomes zero,
    and rows of the source beyond the model's are left out. Parameters that no checkpoint has
    (adapters) keep their values. Optimizers must copy their fp32 master weights from the model
    afterwards.

    Raises UserError if the architectures differ.
    """
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    report = LoadReport()
    for chunk in model_chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        _check_architecture(source, model)
        tied = model.share_embeddings_and_output_weights
        for parameter_name, parameter in model.named_parameters():
            name = name_of_parameter(parameter_name, tied=tied, first_layer=first_layer)
            if name is None:
                report.untouched.append(parameter_name)
                continue
            if name in VOCABULARY:
                tokens = vocab_size or known_tokens(source)
                _fill_vocabulary(parameter.data, source, name, tokens, tp_rank, tp_size, report)
            else:
                _fill(parameter.data, source, name, tp_rank, tp_size)
            report.loaded.append(name)
    return report


@torch.no_grad()
def load_adapters(adapters: AdapterSource, model_chunks: Iterable[nn.Module]) -> str:
    """Copy this rank's slices of `adapters` into a model with LoRA of the same rank and targets.

    Returns a line for the log.
    """
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in model_chunks:
        model = unwrap(chunk)
        layers = model.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in model.named_parameters():
            if not is_trainable(name):
                continue
            layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
            value = adapters.tensors[f"decoder.layers.{rest}"][first_layer + int(layer)]
            if parameter.tensor_model_parallel:
                size = parameter.shape[parameter.partition_dim]
                value = value.narrow(parameter.partition_dim, tp_rank * size, size)
            parameter.copy_(value)
    return f"{adapters.path}: adapters of rank {adapters.config.rank}, training continues with a fresh optimizer"


def _fill_vocabulary(
    parameter: torch.Tensor,
    source: WeightSource,
    name: str,
    vocab_size: int,
    tp_rank: int,
    tp_size: int,
    report: LoadReport,
) -> None:
    rows, first = parameter.shape[0], tp_rank * parameter.shape[0]
    stored, known = source.shape.vocab_size, known_tokens(source)
    have = max(0, min(rows, stored - first))
    if have:
        parameter[:have].copy_(source.read_slice(name, 0, first, first + have))
    parameter[have:].zero_()
    new = slice(max(0, known - first), max(0, min(rows, vocab_size - first)))
    if new.start < new.stop:
        parameter[new] = _mean_row(source, name, known).to(parameter)
    report.new_tokens = max(report.new_tokens, vocab_size - known)
    report.zeroed_rows = max(report.zeroed_rows, rows * tp_size - max(stored, vocab_size))
    report.dropped_rows = max(report.dropped_rows, stored - rows * tp_size)


def _mean_row(source: WeightSource, name: str, known: int) -> torch.Tensor:
    """[h] in fp64, the mean of a table's first `known` rows."""
    blocks = (source.read_slice(name, 0, row, min(row + MEAN_BLOCK, known)) for row in range(0, known, MEAN_BLOCK))
    total = torch.zeros(source.shape.hidden_size, dtype=torch.float64)
    for block in blocks:
        total += block.double().sum(0)
    return total / known


def _fill(parameter: torch.Tensor, source: WeightSource, name: str, tp_rank: int, tp_size: int) -> None:
    dim = weight_of(name).tp_dim
    expected = list(tensor_shape(source.shape, name))
    if dim is not None:
        expected[dim] //= tp_size
    if list(parameter.shape) != expected:
        raise UserError(
            f"{source.path}: {name} gives {expected} to each of {tp_size} tensor-parallel ranks, the model has "
            f"{list(parameter.shape)}; the checkpoint's architecture differs from the flags'"
        )
    if dim is None:
        parameter.copy_(source.read(name))
    else:
        size = parameter.shape[dim]
        parameter.copy_(source.read_slice(name, dim, tp_rank * size, (tp_rank + 1) * size))


def _check_architecture(source: WeightSource, model: Any) -> None:
    """Raise UserError that names the first size in which the model and the checkpoint differ."""
    config, shape = model.config, source.shape
    positions = {True: "learned", False: "rotary"}
    embeddings = {True: "tied", False: "untied"}
    learned, tied = model.position_embedding_type == "learned_absolute", model.share_embeddings_and_output_weights
    compared = [
        ("positions", positions[learned], positions[shape.learned_positions]),
        ("embeddings", embeddings[tied], embeddings[not shape.untie_embeddings_and_output_weights]),
        ("layers", config.num_layers, shape.num_layers),
        ("hidden size", config.hidden_size, shape.hidden_size),
        ("attention heads", config.num_attention_heads, shape.num_attention_heads),
        ("key/value heads", config.num_query_groups, shape.num_query_groups),
        ("feed-forward size", config.ffn_hidden_size, shape.ffn_hidden_size),
    ]
    if learned:
        compared.append(("positions", model.max_sequence_length, shape.max_position_embeddings))
    for what, ours, theirs in compared:
        if ours != theirs:
            raise UserError(
                f"{source.path}: a model with {theirs} {what}, but the flags (or --preset) ask for {ours}; "
                "leave the architecture flags out to take the checkpoint's"
            )
