"""Adam or SGD through Megatron-Core: parameter groups, precision, sharding over data-parallel ranks."""

import argparse

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config
from torch import nn


def build_optimizer(args: argparse.Namespace, chunks: list[nn.Module]):
    """Megatron's optimizer for DDP-wrapped `chunks`: no weight decay on biases and norms; frozen parameters are left out.

    Also tells the model's configuration what the pipeline schedules ask of it (loss scaling, gradient reduction).
    """
    offload = args.optimizer_cpu_offload
    config = OptimizerConfig(
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
        params_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
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
    optimizer = get_megatron_optimizer(config, chunks)
    connect(args, chunks, optimizer)
    return optimizer


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
