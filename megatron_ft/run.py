"""One training run of the Megatron-Core engine on one rank: the model, start or resume, train."""

import contextlib
from dataclasses import replace

import torch

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.resume import described_shape, starting_shape
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.arguments import shape_from_flags, validate, with_shape
from megatron_ft.config.config import Config
from megatron_ft.engine import parallel
from megatron_ft.engine.kernels import kernels_notice, uses_transformer_engine
from megatron_ft.engine.lora import add_lora
from megatron_ft.engine.model import build_model, compute_dtype, wrap_for_data_parallel
from megatron_ft.engine.optimizer import build_optimizer
from megatron_ft.engine.packed_attention import slow_with_dropout
from megatron_ft.engine.step import MegatronCore
from megatron_ft.errors import UserError
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.metrics.model_facts import ShapeFacts
from megatron_ft.model.activation import overridden_activation
from megatron_ft.model.families import PRESETS
from megatron_ft.model.shape import ModelShape, padded_vocab_size
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.training.out_of_memory import out_of_memory
from megatron_ft.training.prepare import Prepared, open_log, open_run, prepare, start
from megatron_ft.training.schedule import Length, build_scheduler
from megatron_ft.training.train import evaluate_only, train


def run(config: Config, device: torch.device, started: float) -> int:
    """Train with the flags of `config` and return the exit status.

    The process groups exist already; `started` is time.monotonic() when the program started. Raises
    UserError.
    """
    if config.optimizer.cpu_offload and device.type == "cpu":
        raise UserError(
            "--optimizer-cpu-offload moves the optimizer state from GPU to host memory, but no GPU is used; leave it out"
        )
    config = with_model(config)
    tokenizer = load_tokenizer(config.data.tokenizer_file)
    assert config.shape is not None
    shape = config.shape.with_vocab(tokenizer.vocab_size)
    state = None
    try:
        prepared = prepare(
            config,
            tokenizer,
            lambda epoch: Checkpointer(config, shape, tokenizer.config_ids, sequences_per_epoch=epoch),
        )
        state = build_state(config, shape, prepared.length, prepared.done)
        reasons = start(prepared, state)
        facts, notices = ShapeFacts(config, shape), kernel_notices(config, shape, device)
        with contextlib.closing(open_log(prepared, state, reasons, device, facts, notices)) as log:
            return train_to_end(prepared, state, shape, log, device, started)
    except torch.OutOfMemoryError as error:
        when = f"after {state.iteration} iterations" if state else "before the first step"
        raise out_of_memory(config, error, when) from error


def train_to_end(
    prepared: Prepared, state: TrainState, shape: ModelShape, log: MetricsLog, device: torch.device, started: float
) -> int:
    """Train until the run ends or is stopped; returns the exit status."""
    config = prepared.config
    engine = MegatronCore(config, state, None if config.loss.softmax_over_padding else shape.vocab_size)
    replicas = parallel.data_parallel_size()
    with open_run(prepared, state, engine, log, device, data_parallel_size=replicas, started=started) as run:
        return evaluate_only(run) if config.validation.skip_train else train(run, engine.step)


def with_model(config: Config) -> Config:
    """`config` with the model's shape and the sequence length.

    Unless flags give them, they come from the checkpoint to resume or to start from. So does the
    activation, which a preset's published checkpoints write in two ways. Raises UserError.
    """
    activation = config.model.activation
    if config.shape is not None:
        found = described_shape(config)
        if found and activation is None:
            config = replace(config, shape=replace(config.shape, exact_gelu=found.exact_gelu))
    else:
        found = starting_shape(config)
        if found is None:
            raise UserError(
                f"no model: --save {config.checkpoint.save} contains no checkpoint yet; "
                f"give --preset (one of {', '.join(sorted(PRESETS))}) or --load DIR"
            )
        config = with_shape(config, shape_from_flags(config, found))
        validate(config)
    if found and (line := overridden_activation(found, activation)):
        config.notices.append(line)
    return config


def build_state(config: Config, shape: ModelShape, length: Length, done: Length) -> TrainState:
    """A random model with optimizer and scheduler, for a run of `length` of which `done` is in a
    checkpoint."""
    padded_vocab = padded_vocab_size(
        shape.vocab_size, config.model.make_vocab_size_divisible_by, config.parallel.tensor
    )
    chunks = build_model(config, shape, padded_vocab)
    if config.lora.rank:
        add_lora(chunks, config)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    return TrainState(model, optimizer, build_scheduler(config, optimizer, length, done))


def kernel_notices(config: Config, shape: ModelShape, device: torch.device) -> list[str]:
    """Lines for the log if layers or attention are not the fastest there are."""
    if device.type != "cuda" or uses_transformer_engine(config):
        return []
    slow = slow_with_dropout(shape.attention_dropout, compute_dtype(config), shape.kv_channels, device)
    return [notice for notice in (kernels_notice(config), slow) if notice]
