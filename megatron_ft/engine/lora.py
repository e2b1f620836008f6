"""LoRA inside Megatron-Core's parallel linear layers, for any tensor and sequence parallelism.

`add_lora(chunks, config)` freezes the model and adds to the layers of --lora-targets a low-rank
update alpha / rank * B A dropout(x), as in PEFT (Hu et al., 2021, https://arxiv.org/abs/2106.09685).
For x [s, b, inputs], A [rank, inputs] and B [outputs, rank] are sharded as follows:

    column parallel (linear_qkv, linear_fc1)    A replicated, rows of B sharded like the weight's
    row parallel (linear_proj, linear_fc2)      columns of A sharded like the weight's, B replicated

Communication is only `rank` wide: the column-parallel A x is gathered over the sequence (or its
gradient summed), the row-parallel A x is summed (or scattered over the sequence). The layers keep
their parameter names, so weights load as without adapters; `sharded_state_dict` includes the
adapters.
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
from torch.distributed import ProcessGroup

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.model.lora import AdapterConfig
from megatron_ft.model.tensor_names import LORA_TARGETS


def add_lora(chunks: list[nn.Module], config: Config) -> None:
    """Freeze `chunks`, which are not yet wrapped in DDP, and add trainable adapters.

    B starts at zero, so the model's output does not change. A depends on --seed, the layer and the
    target, and so is the same in every layout. Raises UserError for Transformer Engine's layers:
    they fuse the norm whose output is the adapter's input.
    """
    adapters = AdapterConfig.from_flags(config.values())
    for chunk in chunks:
        chunk.requires_grad_(False)
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                for target in adapters.targets:
                    layer_seed = config.training.seed * 10_007 + module.layer_number
                    seed = layer_seed * len(LORA_TARGETS) + list(LORA_TARGETS).index(target)
                    _adapt(module.get_submodule(LORA_TARGETS[target]), adapters, seed)
            elif isinstance(module, LanguageModelEmbedding) and config.memory.recompute_granularity == "full":
                # A recomputed layer gives its parameters gradients only if its input requires one.
                module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _adapt(linear: nn.Module, config: AdapterConfig, seed: int) -> None:
    """Change the class of a parallel linear layer of Megatron-Core to the one with adapters."""
    adapted = {ColumnParallelLinear: LoraColumnParallelLinear, RowParallelLinear: LoraRowParallelLinear}
    if type(linear) not in adapted:
        raise UserError(
            f"--lora-rank {config.rank}: layers of type {type(linear).__name__} cannot have adapters; "
            "add --transformer-impl local"
        )
    linear.__class__ = adapted[type(linear)]
    assert isinstance(linear, _Lora)
    linear.init_adapter(config, seed)


class _Lora(nn.Module):
    """The common part of both kinds: parameters and their description in checkpoints.

    `lora_axes`: the adapter that is sharded, and along which axis. Attributes without `lora` are
    those of Megatron-Core's layers.
    """

    lora_axes: dict[str, int]
    input_size: int
    output_size: int
    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    sequence_parallel: bool
    tp_group: ProcessGroup

    def init_adapter(self, config: AdapterConfig, seed: int) -> None:
        """Create this rank's parts of lora_a and lora_b, with the weight's dtype and device."""
        self.lora_scaling, self.lora_dropout = config.scaling, config.dropout
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(self.input_size)  # Kaiming uniform with a = sqrt(5), as in PEFT
        full = {
            "lora_a": torch.empty(config.rank, self.input_size).uniform_(-bound, bound, generator=generator),
            "lora_b": torch.zeros(self.output_size, config.rank),
        }
        for name, tensor in full.items():
            axis = self.lora_axes.get(name)
            if axis is not None:
                tensor = tensor.chunk(self.tp_group.size(), axis)[self.tp_group.rank()]
            parameter = nn.Parameter(tensor.to(self.weight))
            set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, 1)
            parameter.allreduce = True  # type: ignore[attr-defined]  # for Megatron
            # Under sequence parallelism a replicated adapter sees a part of the sequence;
            # Megatron-Core sums the gradients of parameters with this mark.
            parameter.sequence_parallel = (  # type: ignore[attr-defined]
                axis is None and self.sequence_parallel
            )
            self.register_parameter(name, parameter)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The layer's tensors for a torch_dist checkpoint, including adapters."""
        assert metadata is not None
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
    """Y = W x + scaling * B A dropout(x), rows of W and B sharded."""

    lora_axes = {"lora_b": 0}

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """From input_ [s, b, inputs], under sequence parallelism [s / TP, b, inputs], to
        [s, b, outputs / TP]."""
        output, bias = super().forward(input_, *args, **kwargs)
        # The current random state is the right one: without sequence parallelism, all ranks have
        # the same input and the same default state; with it, the block has forked the
        # tensor-parallel state, and each rank has its own part of the sequence.
        dropped = F.dropout(input_, self.lora_dropout, self.training)
        low = F.linear(dropped, self.lora_a)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, self.lora_b), alpha=self.lora_scaling), bias


class LoraRowParallelLinear(_Lora, RowParallelLinear):
    """Y = W x + scaling * B A dropout(x), columns of W and A sharded."""

    lora_axes = {"lora_a": 1}

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """From input_ [s, b, inputs / TP] to [s, b, outputs], under sequence parallelism
        [s / TP, b, outputs]."""
        output, bias = super().forward(input_)
        low = F.linear(self._drop(input_), self.lora_a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return torch.add(output, F.linear(low, self.lora_b), alpha=self.lora_scaling), bias

    def _drop(self, input_: Tensor) -> Tensor:
        """Dropout of a sharded input, which differs per rank: from the tensor-parallel state."""
        if not (self.training and self.lora_dropout) or self.sequence_parallel:
            return F.dropout(input_, self.lora_dropout, self.training)
        with get_cuda_rng_tracker().fork():
            return F.dropout(input_, self.lora_dropout, True)
