"""What every engine sets up for a run: its data and length, its log, and the parts of its loop."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.config import Config
from megatron_ft.data.packed_dataset import (
    Datasets,
    PackedDataset,
    build_datasets,
    sequences_per_epoch,
    training_fill_rate,
)
from megatron_ft.errors import UserError
from megatron_ft.metrics.console import RunPlan
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.metrics.model_facts import ModelFacts
from megatron_ft.metrics.sinks import check_sinks
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.training import signals
from megatron_ft.training.batches import BatchReader
from megatron_ft.training.device import slow_bf16
from megatron_ft.training.run import Engine, Run
from megatron_ft.training.schedule import Length, few_steps, many_epochs, plan_length


@dataclass(frozen=True)
class Prepared:
    """The inputs and the length of a run, known before the model is built.

    `fill_rate` is measured only for --train-tokens, else 1. `sequences_per_epoch` is 0 with
    --skip-train. `done` is the progress of the checkpoint to resume, `length` is that of the entire
    run.
    """

    config: Config
    tokenizer: Tokenizer
    checkpointer: Checkpointer
    datasets: Datasets
    fill_rate: float
    sequences_per_epoch: int
    done: Length
    length: Length


def prepare(config: Config, tokenizer: Tokenizer, open_checkpointer: Callable[[int], Checkpointer]) -> Prepared:
    """Open checkpoints and data, and determine the length.

    `open_checkpointer` is called with the sequences per epoch. Raises UserError.
    """
    check_sinks(config)  # on every rank, so that all exit alike, and before anything takes time
    skip_train, train_tokens = config.validation.skip_train, config.training.train_tokens
    epoch = 0 if skip_train else sequences_per_epoch(config)
    checkpointer = open_checkpointer(epoch)
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
    return Prepared(config, tokenizer, checkpointer, datasets, fill_rate, epoch, done, length)


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


def start(prepared: Prepared, state: TrainState) -> list[str]:
    """Fill `state` from the checkpoint to resume or the weights to start from; lines that report
    how. Raises UserError."""
    config = prepared.config
    reasons = prepared.checkpointer.start(state).reasons
    resumed = Length(state.iteration, state.consumed_samples)
    length = plan_length(config, prepared.sequences_per_epoch, fill_rate=prepared.fill_rate, done=resumed)
    if length != prepared.length:
        raise UserError(
            f"--save {config.checkpoint.save}: its newest checkpoint is damaged and was moved aside, and from the previous "
            f"one the run has another length with --global-batch-size {config.training.global_batch_size}; "
            "start the same command again"
        )
    return reasons


def open_log(
    prepared: Prepared,
    state: TrainState,
    reasons: Sequence[str],
    device: torch.device,
    model: ModelFacts,
    notices: Sequence[str],
) -> MetricsLog:
    """The run's log, beginning with the banner and all notices, those of the engine last."""
    config, datasets, epoch = prepared.config, prepared.datasets, prepared.sequences_per_epoch
    plan = RunPlan(
        train_iters=prepared.length.iterations,
        start_iteration=state.iteration or prepared.checkpointer.weights_iteration * config.validation.skip_train,
        train_samples=prepared.length.samples,
        sequences_per_epoch=epoch,
        device_name=torch.cuda.get_device_name() if device.type == "cuda" else None,
    )
    log = MetricsLog(config, model, plan, config.checkpoint.save, writes=dist.get_rank() == 0)
    prepared.checkpointer.log = log.event
    read = [datasets.train] if datasets.train else [*datasets.valid.values(), *datasets.test.values()]
    log.banner(data="\n".join(dataset.description for dataset in read), start="\n".join(reasons))
    common = [*config.notices, *prepared.tokenizer.notices, *datasets.notices]
    common += slow_bf16(config, device)
    if epoch:
        common += many_epochs(prepared.length, epoch)
    if epoch and config.training.train_epochs:
        unit = config.training.micro_batch_size * config.parallel.data
        common += few_steps(epoch, config.training.train_epochs, config.training.global_batch_size, unit)
    for notice in [*common, *notices]:
        log.event(notice)
    return log


@contextlib.contextmanager
def open_run(
    prepared: Prepared,
    state: TrainState,
    engine: Engine,
    log: MetricsLog,
    device: torch.device,
    *,
    data_parallel_size: int,
    started: float,
) -> Iterator[Run]:
    """The parts of the loop. A context that ends well waits for a save in the background."""
    config, datasets = prepared.config, prepared.datasets

    def reader(dataset: PackedDataset, *, once: bool = True) -> BatchReader:
        return BatchReader(
            dataset,
            config,
            prepared.tokenizer.eod,
            device,
            data_parallel_rank=engine.data_parallel_rank,
            data_parallel_size=data_parallel_size,
            once=once,
        )

    folder = Path(config.checkpoint.save) / "watchdog" if config.checkpoint.save else None
    watchdog = signals.Watchdog(config.logging.watchdog_mins, dist.get_rank(), folder)
    run = Run(
        config=config,
        engine=engine,
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
        yield run
        prepared.checkpointer.finish()
        for opened in (run.train_batches, *run.valid_batches.values(), *run.test_batches.values()):
            if opened:
                opened.close()
    finally:
        watchdog.stop()
