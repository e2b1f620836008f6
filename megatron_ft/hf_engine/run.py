"""One training run of `--engine transformers` on one rank: the model, start or resume, train."""

import contextlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_ft.checkpoint.resume import newest_manifest
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.hf_engine.checkpointer import HfCheckpointer
from megatron_ft.hf_engine.facts import CausalModelFacts
from megatron_ft.hf_engine.model import (
    fit_vocabulary,
    load_model,
    positions_of,
    read_config,
    use_liger,
    with_dropouts,
)
from megatron_ft.hf_engine.start import StartingPoint, find_start
from megatron_ft.hf_engine.trainer import PackedTrainer, shards, training_arguments
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.training.out_of_memory import out_of_memory
from megatron_ft.training.prepare import Prepared, open_log, open_run, prepare, start
from megatron_ft.training.schedule import Length
from megatron_ft.training.train import end, evaluate_only
from megatron_ft.weights.directory import iteration_directory


def run(config: Config, device: torch.device, started: float) -> int:
    """Train with the flags of `config` and return the exit status.

    The process group exists already; `started` is time.monotonic() when the program started. Raises
    UserError.
    """
    if config.precision.fp16 and device.type == "cpu":
        raise UserError("--fp16: loss scaling needs a GPU in --engine transformers; use --bf16, or leave it out")
    point = starting_point(config)
    model_config = read_config(point)
    with_dropouts(model_config, config)
    config = with_sequence_length(config, positions_of(model_config), point)
    tokenizer = load_tokenizer(config.data.tokenizer_file)
    loader = Loader(config, model_config, tokenizer.vocab_size, device)
    state = TrainState([], None, None)
    try:
        prepared = prepare(
            config, tokenizer, lambda epoch: HfCheckpointer(config, tokenizer, loader, sequences_per_epoch=epoch)
        )
        reasons = start(prepared, state)
        facts = CausalModelFacts(state.model[0], point.model, config, sharded=shards(config))
        with contextlib.closing(open_log(prepared, state, reasons, device, facts, loader.notices)) as log:
            vocab_size = None if config.loss.softmax_over_padding else tokenizer.vocab_size
            return train_to_end(prepared, state, vocab_size, log, device, started)
    except torch.OutOfMemoryError as error:
        when = f"after {state.iteration} iterations" if state.iteration else "before the first step was taken"
        raise out_of_memory(config, error, when) from error


@dataclass
class Loader:
    """Loads the model of a directory, with adapters where flags ask for them.

    `tokens`: the tokenizer's. `notices`: lines for the log about what was loaded.
    """

    config: Config
    model_config: Any
    tokens: int
    device: torch.device
    notices: list[str] = field(default_factory=list)

    def __call__(self, directory: Path, adapters: Path | None) -> nn.Module:
        """The model of `directory`, with the weights of `adapters` if they are given. Raises
        UserError."""
        model = load_model(directory, self.model_config, self.config, self.device)
        lines = (fit_vocabulary(model, self.tokens, self.config), use_liger(model, self.config, self.device))
        self.notices += filter(None, lines)
        if not self.config.lora.rank:
            return model
        from megatron_ft.hf_engine.adapters import add_adapters, load_adapters  # PEFT may not be installed

        adapted = add_adapters(model, self.config, directory)
        if adapters:
            load_adapters(adapted, adapters, self.config)
        return adapted


def train_to_end(
    prepared: Prepared,
    state: TrainState,
    vocab_size: int | None,
    log: MetricsLog,
    device: torch.device,
    started: float,
) -> int:
    """Train until the run ends or is stopped; returns the exit status."""
    config, model = prepared.config, state.model[0]
    left = max(1, prepared.length.iterations - state.iteration)  # the Trainer wraps the model only to train
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(config, Path(scratch), steps=left, use_cache=model.config.use_cache)
        done = Length(state.iteration, state.consumed_samples)
        trainer = PackedTrainer(model, config, arguments, vocab_size=vocab_size, length=prepared.length, done=done)
        assert isinstance(prepared.checkpointer, HfCheckpointer)
        prepared.checkpointer.trainer = trainer
        ranks = dist.get_world_size()
        with open_run(prepared, state, trainer, log, device, data_parallel_size=ranks, started=started) as run:
            trainer.run = run
            trainer.train()
            return evaluate_only(run) if config.validation.skip_train else end(run, trainer.stop)


def starting_point(config: Config) -> StartingPoint:
    """The model whose configuration is the run's: of the checkpoint to resume, or of --load."""
    checkpoint, manifest = config.checkpoint, newest_manifest(config)
    if manifest and not manifest.base and checkpoint.save:
        newest = iteration_directory(Path(checkpoint.save), manifest.iteration)
        return find_start(str(newest), "latest", adapters=False)
    if checkpoint.load:
        return find_start(checkpoint.load, checkpoint.load_iteration, adapters=bool(config.lora.rank))
    if manifest and manifest.base:
        return find_start(manifest.base["path"], "latest", adapters=False)
    raise UserError(f"--save {checkpoint.save} contains no checkpoint, and --load is missing; give --load DIR")


def with_sequence_length(config: Config, positions: int | None, point: StartingPoint) -> Config:
    """`config` with the model's positions as sequence length where none is given. Raises UserError
    if there are fewer."""
    length = config.data.seq_length
    if length is None:
        if positions is None:
            raise UserError(f"{point.model}: its config.json names no longest sequence; give --seq-length")
        return replace(config, data=replace(config.data, seq_length=positions))
    if positions is not None and length > positions:
        raise UserError(f"--seq-length {length} exceeds the {positions} positions of {point.model}; use at most that")
    return config
