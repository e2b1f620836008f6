"""Fill a Megatron-Core model with the weights of any checkpoint, whatever the parallel layouts of either.

Every rank reads its own slices from the memory-mapped source: no rank holds the whole model, and no rank sends to another.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from megatron_ft.checkpoint.names import WTE, core_to_hf, hf_shape, weight_of
from megatron_ft.checkpoint.weights import WeightSource
from megatron_ft.errors import UserError


@dataclass
class LoadReport:
    """What `load_weights` did on this rank: HF names read, vocabulary rows zeroed or left out, parameters not in the source."""

    loaded: list[str] = field(default_factory=list)
    zeroed_rows: int = 0
    dropped_rows: int = 0
    untouched: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Sentences for the log."""
        said = [f"{len(set(self.loaded))} tensors loaded"]
        if self.zeroed_rows:
            said.append(f"{self.zeroed_rows} vocabulary rows beyond the checkpoint's are zero")
        if self.dropped_rows:
            said.append(f"{self.dropped_rows} vocabulary rows of the checkpoint are beyond the model's and left out")
        if self.untouched:
            said.append(
                f"{len(self.untouched)} parameters are not in the checkpoint and keep their start ({self.untouched[0]} ...)"
            )
        return said


def unwrap(module: nn.Module) -> nn.Module:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module


@torch.no_grad()
def load_weights(source: WeightSource, model_chunks: Iterable[nn.Module]) -> LoadReport:
    """Copy this rank's slices of `source` into the parameters of its model chunks, in place, cast to their dtype.

    Vocabulary rows beyond the source's become zero, the source's beyond the model's are left out. Parameters HF has no name
    for (adapters) keep their values. Raises UserError when the architectures differ. Optimizers must copy their fp32
    master weights from the model afterwards.
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
        for core_name, parameter in model.named_parameters():
            name = core_to_hf(core_name, first_layer)
            if name is None:
                report.untouched.append(core_name)
                continue
            _fill(parameter.data, source, name, tp_rank, tp_size, report)
            report.loaded.append(name)
    return report


def _fill(
    parameter: torch.Tensor, source: WeightSource, name: str, tp_rank: int, tp_size: int, report: LoadReport
) -> None:
    dim = weight_of(name).tp_dim
    if name == WTE:
        rows, first = parameter.shape[0], tp_rank * parameter.shape[0]
        there = source.shape.vocab_size
        have = max(0, min(rows, there - first))
        if have:
            parameter[:have].copy_(source.read_slice(name, 0, first, first + have))
        parameter[have:].zero_()
        report.zeroed_rows = max(report.zeroed_rows, rows * tp_size - there)
        report.dropped_rows = max(report.dropped_rows, there - rows * tp_size)
        return
    expected = list(hf_shape(source.shape, name))
    if dim is not None:
        expected[dim] //= tp_size
    if list(parameter.shape) != expected:
        raise UserError(
            f"{source.path}: {name} gives {expected} to each of {tp_size} tensor-parallel ranks, the model wants "
            f"{list(parameter.shape)}; the checkpoint's architecture differs from the flags'"
        )
    if dim is None:
        parameter.copy_(source.read(name))
    else:
        size = parameter.shape[dim]
        parameter.copy_(source.read_slice(name, dim, tp_rank * size, (tp_rank + 1) * size))


def _check_architecture(source: WeightSource, model: nn.Module) -> None:
    """Raise UserError naming the first number in which the model and the checkpoint differ."""
    config, shape = model.config, source.shape
    for what, ours, theirs in (
        ("layers", config.num_layers, shape.num_layers),
        ("hidden size", config.hidden_size, shape.hidden_size),
        ("attention heads", config.num_attention_heads, shape.num_attention_heads),
        ("key/value heads", config.num_query_groups, shape.num_query_groups),
        ("feed-forward size", config.ffn_hidden_size, shape.ffn_hidden_size),
        ("positions", model.max_sequence_length, shape.max_position_embeddings),
    ):
        if ours != theirs:
            raise UserError(
                f"{source.path}: a model with {theirs} {what}, but the flags (or --preset) ask for {ours}; "
                "leave the architecture flags out to take the checkpoint's"
            )
