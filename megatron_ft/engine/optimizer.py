"""Adam or SGD by Megatron-Core: parameter groups, precision, sharding by data-parallel rank."""

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.utils import get_model_config, local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor, nn

from megatron_ft.checkpoint.optimizer_state import parts
from megatron_ft.config.config import Config
from megatron_ft.engine.model import compute_dtype


def build_optimizer(config: Config, chunks: list[nn.Module]):
    """Megatron's optimizer for DDP-wrapped `chunks`, without frozen parameters.

    Biases and norms have no weight decay. Also connects loss scaling and gradient reduction to the
    pipeline schedules (`connect`).
    """
    optimizer = get_megatron_optimizer(optimizer_config(config), chunks)
    _use_fused_kernels(optimizer)
    connect(config, chunks, optimizer)
    return optimizer


def optimizer_config(config: Config) -> OptimizerConfig:
    """Megatron-Core's configuration of the optimizer for the flags of `config`."""
    offload = config.optimizer.cpu_offload
    # An infinite limit clips nothing but still measures the norm.
    clip_grad = config.optimizer.clip_grad or float("inf")
    return OptimizerConfig(
        optimizer=config.optimizer.name,
        lr=config.schedule.lr,
        min_lr=config.schedule.min_lr,
        weight_decay=config.optimizer.weight_decay,
        adam_beta1=config.optimizer.adam_beta1,
        adam_beta2=config.optimizer.adam_beta2,
        adam_eps=config.optimizer.adam_eps,
        sgd_momentum=config.optimizer.sgd_momentum,
        clip_grad=clip_grad,
        fp16=config.precision.fp16,
        bf16=config.precision.bf16,
        params_dtype=compute_dtype(config),
        loss_scale=config.precision.loss_scale if config.precision.fp16 else None,
        initial_loss_scale=config.precision.initial_loss_scale,
        min_loss_scale=config.precision.min_loss_scale,
        loss_scale_window=config.precision.loss_scale_window,
        hysteresis=config.precision.hysteresis,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        optimizer_cpu_offload=offload,
        optimizer_offload_fraction=1.0 if offload else 0.0,
        use_torch_optimizer_for_cpu_offload=offload,
    )


def _use_fused_kernels(optimizer) -> None:
    """Use torch's fused Adam, gradient norm and gradient scaling.

    Without Transformer Engine and apex, Megatron-Core uses the unfused Adam, with about three times
    the memory traffic, synchronizes with the GPU once per parameter for the norm, and copies every
    gradient to scale it.
    """
    for part in parts(optimizer):
        if type(part.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _l2_norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Norm [1] of all of `tensors[0]` together, on their device; the signature is that of apex's
    `multi_tensor_l2norm`."""
    return torch.nn.utils.get_total_norm(tensors[0]).reshape(1), None


def _scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """Multiply gradients by `factor` in place; the signature is that of apex's
    `multi_tensor_scale`, which clipping calls with the same list as source and target."""
    torch._foreach_mul_(tensors[1], factor)


def connect(config: Config, chunks: list[nn.Module], optimizer) -> None:
    """Give this model's loss scaling and gradient reduction to the pipeline schedules."""
    model_config = get_model_config(chunks[0])
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        model_config.no_sync_func = chunks[0].no_sync
