"""LoRA inside Megatron-Core's parallel linear layers, at any tensor-parallel size, with and without sequence parallelism.

`add_lora(chunks, config)` freezes the model and gives the layers of --lora-targets a low-rank update alpha / rank * B A dropout(x),
as PEFT computes it (Hu et al., 2021). How A [rank, inputs] and B [outputs, rank] are cut, x being [s, b, inputs]:

    column parallel (linear_qkv, linear_fc1)        A whole on every rank, B's rows cut as the weight's rows are
    row parallel (linear_proj, linear_fc2)          A's columns cut as the weight's columns are, B whole

What crosses ranks is only rank wide: the column-parallel A x is gathered over the sequence (or its gradient summed), the row-parallel
A x is summed (or scattered over the sequence). The layers keep their class's names, so weights load as without adapters, and
`sharded_state_dict` describes the adapters too.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.model.lora import AdapterConfig, is_trainable
from megatron_ft.model.tensor_names import LORA_TARGETS

__all__ = ["add_lora", "is_trainable"]


def add_lora(chunks: list[nn.Module], config: Config) -> None:
    """Freeze `chunks` (from `build_model`, before they are wrapped for data parallelism) and add trainable adapters.

    B starts at zero, so the model computes what it did. A is drawn from --seed, the layer and the target alone: the same in every
    layout. Raises UserError where layers are Transformer Engine's, which fuse the norm that an adapter would need the output of.
    """
    adapters = AdapterConfig.from_flags(config.values())
    for chunk in chunks:
        chunk.requires_grad_(False)
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                for target in adapters.targets:
                    linear = module.get_submodule(LORA_TARGETS[target])
                    _adapt(
                        linear,
                        adapters,
                        seed=(config.training.seed * 10_007 + module.layer_number) * len(LORA_TARGETS)
                        + list(LORA_TARGETS).index(target),
                    )
            elif isinstance(module, LanguageModelEmbedding) and config.memory.recompute_granularity == "full":
                # A checkpointed layer whose input needs no gradient would give none to its parameters either.
                module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _adapt(linear: nn.Module, config: AdapterConfig, seed: int) -> None:
    """Turn one of Megatron-Core's parallel linear layers into its subclass with adapters; weight and bias stay as they are."""
    adapted = {ColumnParallelLinear: LoraColumnParallelLinear, RowParallelLinear: LoraRowParallelLinear}
    if type(linear) not in adapted:
        raise UserError(
            f"--lora-rank {config.rank}: layers of type {type(linear).__name__} take no adapters; "
            "add --transformer-impl local"
        )
    linear.__class__ = adapted[type(linear)]
    linear.init_adapter(config, seed)


class _Lora:
    """What both kinds share: parameters, their place in checkpoints, and dropout."""

    lora_axes: dict[str, int]  # which adapter is cut over tensor-parallel ranks, and its dimension

    def init_adapter(self, config: AdapterConfig, seed: int) -> None:
        """Make lora_a and lora_b, this rank's parts, in the weight's dtype and on its device."""
        self.lora_scaling, self.lora_dropout = config.scaling, config.dropout
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.input_size)  # PEFT's start: Kaiming uniform with a = sqrt(5)
        whole = {
            "lora_a": torch.empty(config.rank, self.input_size).uniform_(-bound, bound, generator=generator),
            "lora_b": torch.zeros(self.output_size, config.rank),
        }
        for name, tensor in whole.items():
            axis = self.lora_axes.get(name)
            if axis is not None:
                tensor = tensor.chunk(self.tp_group.size(), axis)[self.tp_group.rank()]
            parameter = nn.Parameter(tensor.to(self.weight))
            set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, 1)
            parameter.allreduce = True
            # Where the sequence is cut, a whole adapter sees its rank's part of it: Megatron-Core sums such gradients.
            parameter.sequence_parallel = axis is None and self.sequence_parallel
            self.register_parameter(name, parameter)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The layer's tensors for torch_dist, adapters included."""
        axes = {"weight": 0, "bias": 0} if isinstance(self, ColumnParallelLinear) else {"weight": 1}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes | self.lora_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class LoraColumnParallelLinear(_Lora, ColumnParallelLinear):
    """Y = W x + scaling B A dropout(x), rows of W and B cut."""

    lora_axes = {"lora_b": 0}

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """input_ [s, b, inputs], or [s / TP, b, inputs] under sequence parallelism; output [s, b, outputs / TP]."""
        output, bias = super().forward(input_, *args, **kwargs)
        # Without sequence parallelism all ranks hold the same input and the default random state; with it, the block
        # has forked the tensor-parallel state and each rank drops in its own part of the sequence. Both are right as they are.
        dropped = F.dropout(input_, self.lora_dropout, self.training)
        low = F.linear(dropped, self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, self.lora_b), alpha=self.lora_scaling), bias


class LoraRowParallelLinear(_Lora, RowParallelLinear):
    """Y = W x + scaling B A dropout(x), columns of W and A cut."""

    lora_axes = {"lora_a": 1}

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_ [s, b, inputs / TP]; output [s, b, outputs], or [s / TP, b, outputs] under sequence parallelism."""
        output, bias = super().forward(input_)
        low = F.linear(self._drop(input_), self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, self.lora_b), alpha=self.lora_scaling), bias

    def _drop(self, input_: Tensor) -> Tensor:
        """Dropout of an input cut over ranks: each draws its own, from the tensor-parallel random state."""
        if not (self.training and self.lora_dropout) or self.sequence_parallel:
            return F.dropout(input_, self.lora_dropout, self.training)
        with get_cuda_rng_tracker().fork():
            return F.dropout(input_, self.lora_dropout, True)
