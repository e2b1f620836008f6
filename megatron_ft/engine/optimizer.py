"""Adam or SGD through Megatron-Core: parameter groups, precision, sharding over data-parallel ranks."""

import argparse

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.utils import get_model_config, local_multi_tensor_l2_norm
from torch import Tensor, nn

from megatron_ft.checkpoint.optimizer_state import parts
from megatron_ft.engine.model import compute_dtype


def build_optimizer(args: argparse.Namespace, chunks: list[nn.Module]):
    """Megatron's optimizer for DDP-wrapped `chunks`: no weight decay on biases and norms; frozen parameters are left out.

    Also tells the model's configuration what the pipeline schedules ask of it (loss scaling, gradient reduction).
    """
    optimizer = get_megatron_optimizer(optimizer_config(args), chunks)
    _use_fused_kernels(optimizer)
    connect(args, chunks, optimizer)
    return optimizer


def optimizer_config(args: argparse.Namespace) -> OptimizerConfig:
    """Megatron-Core's configuration of the optimizer under the flags of `args`."""
    offload = args.optimizer_cpu_offload
    return OptimizerConfig(
        optimizer=args.optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        sgd_momentum=args.sgd_momentum,
        clip_grad=args.clip_grad or float("inf"),  # at infinity nothing is clipped, and the norm is still measured
        fp16=args.fp16,
        bf16=args.bf16,
        params_dtype=compute_dtype(args),
        loss_scale=args.loss_scale if args.fp16 else None,
        initial_loss_scale=args.initial_loss_scale,
        min_loss_scale=args.min_loss_scale,
        loss_scale_window=args.loss_scale_window,
        hysteresis=args.hysteresis,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
        optimizer_cpu_offload=offload,
        optimizer_offload_fraction=1.0 if offload else 0.0,
        use_torch_optimizer_for_cpu_offload=offload,
    )


def _use_fused_kernels(optimizer) -> None:
    """Without Transformer Engine and apex, Megatron-Core updates with Adam's unfused form, some three times the memory traffic, and waits for
    the GPU once a parameter to add up the norm. Torch has the fused forms of both."""
    for part in parts(optimizer):
        if type(part.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group.update(fused=True, foreach=False)
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Norm [1] of all of `tensors[0]`, on their device; in the place and the signature of apex's `multi_tensor_l2norm`."""
    return torch.nn.utils.get_total_norm(tensors[0]).reshape(1), None


def connect(args: argparse.Namespace, chunks: list[nn.Module], optimizer) -> None:
    """Give the pipeline schedules this model's loss scaling and gradient reduction."""
    config = get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        config.no_sync_func = chunks[0].no_sync


def learning_rate(optimizer) -> float:
    """The rate of the parameter groups that follow the schedule unchanged."""
    return next(group["lr"] for group in optimizer.param_groups if group.get("default_config", True))
