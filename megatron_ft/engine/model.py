"""Models of all families as Megatron-Core's GPTModel: configuration, layer specification, DDP.

The layer specification replaces two modules that Megatron-Core lacks without Transformer Engine: a
layer norm for sequence parallelism, and attention over packed sequences.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_ft.config.config import Config
from megatron_ft.engine.exact_gelu import fuse_exact_gelu
from megatron_ft.engine.kernels import fuses_gradient_accumulation, uses_transformer_engine
from megatron_ft.engine.packed_attention import PackedAttention
from megatron_ft.model.shape import ModelShape


class SequenceParallelLayerNorm(nn.LayerNorm):
    """Layer norm with gradients that Megatron-Core sums over tensor-parallel ranks under sequence
    parallelism, where each rank has a part of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # for Megatron


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of the weights: --bf16, --fp16, or fp32."""
    return torch.bfloat16 if config.precision.bf16 else torch.float16 if config.precision.fp16 else torch.float32


def transformer_config(config: Config, shape: ModelShape) -> TransformerConfig:
    """Megatron-Core's configuration for `shape` and the flags of `config`."""
    dtype = compute_dtype(config)
    fuse = torch.cuda.is_available()
    # Megatron's fused kernel computes the tanh approximation of GELU, which StarCoder was trained
    # with; plain F.gelu is the exact form with erf, whose kernel is in exact_gelu.py.
    fuse_gelu = fuse and not shape.exact_gelu
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        kv_channels=shape.kv_channels,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        normalization="LayerNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        add_bias_linear=True,
        bias_activation_fusion=fuse_gelu,
        activation_func=F.gelu if fuse_gelu or shape.exact_gelu else partial(F.gelu, approximate="tanh"),
        bias_dropout_fusion=fuse,
        gradient_accumulation_fusion=fuses_gradient_accumulation(config),
        masked_softmax_fusion=False,
        init_method_std=shape.init_method_std,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        context_parallel_size=config.parallel.context,
        sequence_parallel=config.parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision.bf16,
        fp16=config.precision.fp16,
        recompute_granularity=config.memory.recompute_granularity,
        recompute_method=config.memory.recompute_method,
        recompute_num_layers=config.memory.recompute_num_layers,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=False,
        batch_p2p_comm=True,
    )


def layer_spec(config: Config, shape: ModelShape, transformer: TransformerConfig):
    """Specification of the transformer block: Transformer Engine's if it is used, else
    Megatron-Core's local one with the two modules of this package."""
    if uses_transformer_engine(config):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec()
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = SequenceParallelLayerNorm
    layer.submodules.pre_mlp_layernorm = SequenceParallelLayerNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        PackedAttention, params={"rotary_base": shape.rotary_base, "window_size": shape.window_size}
    )
    layers = shape.num_layers // config.parallel.pipeline
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=SequenceParallelLayerNorm)


def build_model(config: Config, shape: ModelShape, padded_vocab: int) -> list[nn.Module]:
    """This rank's part of the model with random weights, in `compute_dtype`: one chunk without DDP.

    `padded_vocab`: embedding rows over all tensor-parallel ranks. Process groups must exist
    (`parallel.initialize`).
    """
    from megatron.core import parallel_state

    transformer = transformer_config(config, shape)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=layer_spec(config, shape, transformer),
        vocab_size=padded_vocab,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        # Rotary positions are applied by PackedAttention.
        position_embedding_type="learned_absolute" if shape.learned_positions else "none",
    )
    if shape.exact_gelu and torch.cuda.is_available():
        fuse_exact_gelu(model)
    # Parameters are replicated unless their layer has marked them; the norm counts replicas once.
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    model.cuda(torch.cuda.current_device())
    if config.precision.bf16 or config.precision.fp16:
        model = Float16Module(transformer, model)
    return [model]


def wrap_for_data_parallel(config: Config, chunks: list[nn.Module]) -> list[DistributedDataParallel]:
    """`chunks` in Megatron's DDP, with the same weights on all data-parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.fp32_gradients,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # the training loop checks the loss and logs its documents
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped
