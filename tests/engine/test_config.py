"""Numbers given by flags reach Megatron-Core's configurations."""

import math

import torch
from token_files import training_flags

from megatron_ft.config.flag import flag_fields
from megatron_ft.config.flags import Model
from megatron_ft.engine.model import SequenceParallelLayerNorm, transformer_config
from megatron_ft.engine.optimizer import optimizer_config

# Values that are neither Megatron-Core's defaults nor the preset's.
MODEL = {
    "num_layers": 6,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "ffn_hidden_size": 100,
    "layernorm_epsilon": 3e-4,
    "init_method_std": 0.013,
    "hidden_dropout": 0.21,
    "attention_dropout": 0.32,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 3,
    "recompute_num_layers": 2,
}
OPTIMIZER = {
    "lr": 3e-3,
    "min_lr": 2e-4,
    "weight_decay": 0.07,
    "adam_beta1": 0.83,
    "adam_beta2": 0.94,
    "adam_eps": 3e-7,
    "sgd_momentum": 0.71,
    "clip_grad": 0.37,
    "loss_scale": 512.0,
    "initial_loss_scale": 1024.0,
    "min_loss_scale": 4.0,
    "loss_scale_window": 77,
    "hysteresis": 5,
}


def words(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_model_flags_reach_megatron():
    flags = words(MODEL) + words({"recompute_granularity": "full", "recompute_method": "block"})
    flags_of_run = training_flags("--data-prefix", "unused", "--bf16", "--sequence-parallel", *flags, world_size=6)
    config = transformer_config(flags_of_run, flags_of_run.shape)
    assert {name: getattr(config, name) for name in MODEL} == MODEL
    assert SequenceParallelLayerNorm(config, 96, eps=config.layernorm_epsilon).eps == MODEL["layernorm_epsilon"]
    assert (config.num_query_groups, config.kv_channels) == (1, 16)
    assert config.bf16 and config.sequence_parallel and config.params_dtype == config.pipeline_dtype == torch.bfloat16
    assert (config.recompute_granularity, config.recompute_method) == ("full", "block")
    numbers = {flag.dest for _, flag in flag_fields(Model) if flag.bounds}
    own = {"num_query_groups", "rotary_base", "window_size"}  # of families: tests/engine/test_transformers.py
    assert numbers - set(MODEL) - own == {"max_position_embeddings", "make_vocab_size_divisible_by"}, "of the embedding"


def test_optimizer_flags_reach_megatron():
    flags = ["--data-prefix", "unused", *words(OPTIMIZER)]
    switches = ("--fp16", "--overlap-grad-reduce", "--overlap-param-gather", "--optimizer-cpu-offload")
    config = optimizer_config(training_flags(*flags, *switches))
    assert {name: getattr(config, name) for name in OPTIMIZER} == OPTIMIZER
    assert (config.optimizer, config.fp16, config.params_dtype) == ("adam", True, torch.float16)
    assert config.use_distributed_optimizer and config.overlap_param_gather and config.optimizer_offload_fraction == 1
    other = optimizer_config(training_flags(*flags, "--optimizer", "sgd", "--bf16", "--clip-grad", "0"))
    assert (other.optimizer, other.bf16, other.params_dtype) == ("sgd", True, torch.bfloat16)
    assert not other.use_distributed_optimizer and other.loss_scale is None and other.clip_grad == math.inf
