"""One training run on one rank: prepare data and length, start or resume, open the log, train."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.resume import described_shape, starting_shape
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.arguments import shape_from_flags, validate, with_shape
from megatron_ft.config.config import Config
from megatron_ft.data.packed_dataset import (
    Datasets,
    PackedDataset,
    build_datasets,
    sequences_per_epoch,
    training_fill_rate,
)
from megatron_ft.engine import parallel, signals
from megatron_ft.engine.batches import BatchReader
from megatron_ft.engine.kernels import kernels_notice, uses_transformer_engine
from megatron_ft.engine.lora import add_lora
from megatron_ft.engine.model import build_model, compute_dtype, wrap_for_data_parallel
from megatron_ft.engine.optimizer import build_optimizer
from megatron_ft.engine.out_of_memory import out_of_memory
from megatron_ft.engine.packed_attention import slow_with_dropout
from megatron_ft.engine.run import Run
from megatron_ft.engine.schedule import Length, build_scheduler, many_epochs, plan_length
from megatron_ft.engine.train import train
from megatron_ft.errors import UserError
from megatron_ft.metrics.console import RunPlan
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.metrics.model_facts import ShapeFacts
from megatron_ft.model.activation import overridden_activation
from megatron_ft.model.families import PRESETS
from megatron_ft.model.shape import ModelShape, padded_vocab_size
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizer.tokenizer import load_tokenizer


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
    state = None
    try:
        prepared = prepare(config)
        state, reasons = start(prepared)
        with contextlib.closing(open_log(prepared, state, reasons, device)) as log:
            return train_to_end(prepared, state, log, device, started)
    except torch.OutOfMemoryError as error:
        when = f"after {state.iteration} iterations" if state else "before the first step"
        raise out_of_memory(config, error, when) from error


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


@dataclass(frozen=True)
class Prepared:
    """The inputs and the length of a run, known before the model is built.

    `shape` includes the tokenizer's vocabulary. `fill_rate` is measured only for --train-tokens,
    else 1. `sequences_per_epoch` is 0 with --skip-train. `done` is the progress of the checkpoint
    to resume, `length` is that of the entire run.
    """

    config: Config
    shape: ModelShape
    tokenizer: Tokenizer
    checkpointer: Checkpointer
    datasets: Datasets
    fill_rate: float
    sequences_per_epoch: int
    done: Length
    length: Length


def prepare(config: Config) -> Prepared:
    """Open tokenizer, checkpoints and data, and determine the length; `config.shape` is known."""
    assert config.shape is not None
    skip_train, train_tokens = config.validation.skip_train, config.training.train_tokens
    tokenizer = load_tokenizer(config.data.tokenizer_file)
    shape = config.shape.with_vocab(tokenizer.vocab_size)
    epoch = 0 if skip_train else sequences_per_epoch(config)
    checkpointer = Checkpointer(config, shape, tokenizer.config_ids, sequences_per_epoch=epoch)
    fill_rate = training_fill_rate(config) if train_tokens else 1.0
    done = Length(*checkpointer.progress())
    length = plan_length(config, epoch, fill_rate=fill_rate, done=done)
    if train_tokens:
        config.notices.append(
            f"--train-tokens {train_tokens:,}: {length.samples:,} sequences of "
            f"{fill_rate * config.data.seq_length:,.1f} tokens on average"
        )
    datasets = build_datasets(
        config,
        train_samples=None if skip_train else length.samples,
        pad=tokenizer.eod if tokenizer.pad is None else tokenizer.pad,
        vocab_size=tokenizer.vocab_size,
    )
    check_groups(config, datasets)
    return Prepared(config, shape, tokenizer, checkpointer, datasets, fill_rate, epoch, done, length)


def check_groups(config: Config, datasets: Datasets) -> None:
    """Raise UserError for flags about validation if the groups they need do not exist."""
    remedy = "give --valid-weighted-split-paths-path FILE, or a --validation-fraction above 0"
    if config.validation.best_group and config.validation.best_group not in datasets.valid:
        raise UserError(
            f"--best-group {config.validation.best_group} is not a validation group; "
            f"the groups are: {', '.join(datasets.valid) or 'none'}"
        )
    if config.validation.skip_train and not (datasets.valid or datasets.test):
        raise UserError(f"--skip-train has nothing to evaluate: {remedy}")
    if config.validation.at_start and not datasets.valid:
        raise UserError(f"--eval-at-start needs a validation group: {remedy}")
    if config.validation.early_stop_patience and not (datasets.valid and config.validation.interval):
        raise UserError("--early-stop-patience needs a validation group and --eval-interval above 0")


def start(prepared: Prepared) -> tuple[TrainState, list[str]]:
    """Model and optimizer, resumed or with the weights to start from, and lines that report how."""
    config = prepared.config
    state = build_state(config, prepared.shape, prepared.length, prepared.done)
    start = prepared.checkpointer.start(state)
    resumed = Length(state.iteration, state.consumed_samples)
    length = plan_length(config, prepared.sequences_per_epoch, fill_rate=prepared.fill_rate, done=resumed)
    if length != prepared.length:
        raise UserError(
            f"--save {config.checkpoint.save}: its newest checkpoint is damaged and was moved aside, and from the previous "
            f"one the run has another length with --global-batch-size {config.training.global_batch_size}; "
            "start the same command again"
        )
    return state, start.reasons


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


def open_log(prepared: Prepared, state: TrainState, reasons: list[str], device: torch.device) -> MetricsLog:
    """The run's log, beginning with the banner and all notices."""
    config, datasets, epoch = prepared.config, prepared.datasets, prepared.sequences_per_epoch
    plan = RunPlan(
        train_iters=prepared.length.iterations,
        start_iteration=state.iteration or prepared.checkpointer.weights_iteration * config.validation.skip_train,
        train_samples=prepared.length.samples,
        sequences_per_epoch=epoch,
        device_name=torch.cuda.get_device_name() if device.type == "cuda" else None,
    )
    model = ShapeFacts(config, prepared.shape)
    log = MetricsLog(config, model, plan, config.checkpoint.save, writes=dist.get_rank() == 0)
    prepared.checkpointer.log = log.event
    read = [datasets.train] if datasets.train else [*datasets.valid.values(), *datasets.test.values()]
    log.banner(data="\n".join(dataset.description for dataset in read), start="\n".join(reasons))
    notices = [*config.notices, *prepared.tokenizer.notices, *datasets.notices]
    notices += many_epochs(prepared.length, epoch) if epoch else []
    for notice in [*notices, *kernel_notices(config, prepared.shape, device)]:
        log.event(notice)
    return log


def kernel_notices(config: Config, shape: ModelShape, device: torch.device) -> list[str]:
    """Lines for the log if layers or attention are not the fastest there are."""
    if device.type != "cuda" or uses_transformer_engine(config):
        return []
    slow = slow_with_dropout(shape.attention_dropout, compute_dtype(config), shape.kv_channels, device)
    return [notice for notice in (kernels_notice(config), slow) if notice]


def train_to_end(prepared: Prepared, state: TrainState, log: MetricsLog, device: torch.device, started: float) -> int:
    """Train until the run ends or is stopped; returns the exit status."""
    config, datasets = prepared.config, prepared.datasets

    def reader(dataset: PackedDataset, *, once: bool = True) -> BatchReader:
        return BatchReader(
            dataset,
            config,
            prepared.tokenizer.eod,
            device,
            data_parallel_rank=parallel.data_parallel_rank(),
            data_parallel_size=parallel.data_parallel_size(),
            once=once,
        )

    folder = Path(config.checkpoint.save) / "watchdog" if config.checkpoint.save else None
    watchdog = signals.Watchdog(config.logging.watchdog_mins, dist.get_rank(), folder)
    training = Run(
        config=config,
        vocab_size=None if config.loss.softmax_over_padding else prepared.shape.vocab_size,
        length=prepared.length,
        state=state,
        checkpointer=prepared.checkpointer,
        log=log,
        watchdog=watchdog,
        train_batches=reader(datasets.train, once=False) if datasets.train else None,
        valid_batches={name: reader(dataset) for name, dataset in datasets.valid.items()},
        test_batches={name: reader(dataset) for name, dataset in datasets.test.items()},
        started=started,
    )
    try:
        status = train(training)
        prepared.checkpointer.finish()
        for opened in (training.train_batches, *training.valid_batches.values(), *training.test_batches.values()):
            if opened:
                opened.close()
        return status
    finally:
        watchdog.stop()
