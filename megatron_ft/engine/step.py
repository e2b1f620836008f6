"""One optimizer step over a global batch, and what ends a run in the middle of one."""

import math
import time
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F

from megatron_ft.config.config import Config
from megatron_ft.engine import parallel, signals
from megatron_ft.engine.batches import BatchReader, MicroBatch
from megatron_ft.engine.loss import token_losses
from megatron_ft.engine.nonfinite_loss import write_provenance
from megatron_ft.engine.optimizer import learning_rate
from megatron_ft.engine.pipeline import run_micro_batches
from megatron_ft.engine.run import Run, Totals
from megatron_ft.engine.schedule import global_batch_at
from megatron_ft.errors import UserError


def local_sums(micro_batches: list[MicroBatch]) -> list[float]:
    """What this rank adds to a step's Totals: its micro-batches' sums, or zeros."""
    count = parallel.counts_here()
    return [float(sum(getattr(micro, item.name) for micro in micro_batches if count)) for item in fields(Totals)]


def step(run: Run) -> str | None:
    """One optimizer step; returns what stops the run (a signal, the time limit), the same on all
    ranks, or None.

    The host waits for the device once, for the gradient norm: the sums over the next batch are
    known from the step before.
    """
    config, state, reader = run.config, run.state, run.train_batches
    assert reader is not None  # only --skip-train has none
    begun = time.perf_counter()
    batch_size = global_batch_at(config, state.consumed_samples)
    following = state.consumed_samples + batch_size
    next_batch_size = global_batch_at(config, following) if following < run.length.samples else 0
    micro_batches = reader.read(state.consumed_samples, batch_size, next_batch_size)
    totals = run.totals_ahead or Totals(*parallel.sum_over_all(local_sums(micro_batches)))
    parallel.seed_step(config.training.seed, state.iteration)
    losses = forward_backward(config, state.model, state.optimizer, micro_batches, totals.weight, run.vocab_size)
    agreement = _agree(run, losses, reader.read_ahead(following, next_batch_size) if next_batch_size else [])
    lr = learning_rate(state.optimizer)
    updated, grad_norm, _ = state.optimizer.step()
    loss, signaled, overtime, *ahead = agreement.result()
    if not math.isfinite(loss):
        _end_nonfinite(run, f"non-finite loss ({loss})", reader, micro_batches, losses.tolist())
    run.totals_ahead = Totals(*ahead) if next_batch_size else None
    if updated:
        state.scheduler.step(increment=batch_size)
        if not math.isfinite(grad_norm):
            every = [math.nan] * len(micro_batches)
            _end_nonfinite(run, f"non-finite gradient norm ({grad_norm})", reader, micro_batches, every)
    else:
        state.skipped_iterations += 1
    state.iteration += 1
    state.consumed_samples += batch_size
    state.consumed_tokens += int(totals.document_tokens)
    run.log.step(
        {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "loss": loss if totals.weight else None,
            "lr": lr,
            "grad_norm": grad_norm if updated else None,
            "loss_scale": float(state.optimizer.get_loss_scale()) if config.precision.fp16 else 1.0,
            "global_batch_size": batch_size,
            "loss_tokens": int(totals.loss_tokens),
            "fill_rate": totals.document_tokens / (batch_size * config.data.seq_length),
            "skipped_iterations": state.skipped_iterations,
            "squared_lengths": totals.squared_lengths,
            "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "step_seconds": time.perf_counter() - begun,
        }
    )
    return _what_stops(run, signaled, overtime)


def forward_backward(
    config: Config,
    model: list,
    optimizer,
    micro_batches: list[MicroBatch],
    weight: float,
    vocab_size: int | None,
) -> torch.Tensor:
    """Accumulate the gradients of the step's mean loss in the DDP buffers.

    `weight` is the sum of the loss weights over the global batch. Returns what each micro-batch
    contributes to the mean, [micro-batches] on the device; empty except on the last pipeline stage.

    Megatron's schedule divides a micro-batch's loss by their number, and its DDP averages over
    data-parallel ranks. Both are undone by `scale`, because the contributions already add up to the
    mean.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    scale = len(micro_batches) * parallel.data_parallel_size()

    def loss_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = token_losses(logits, micro.labels, vocab_size)
        contribution = (losses * micro.weights).sum() / (weight or 1.0)
        return contribution * scale, contribution.detach().clone()

    contributions = run_micro_batches(config, model, micro_batches, loss_of)
    return torch.empty(0) if contributions is None else contributions


def _agree(run: Run, losses: torch.Tensor, next_micro_batches: list[MicroBatch]) -> parallel.SumOverAll:
    """What all ranks must know, by one small all-reduce: the step's loss, whether a signal came,
    whether time is up, and the Totals of the next step."""
    minutes = run.config.logging.exit_duration_in_mins
    overtime = minutes is not None and time.monotonic() - run.started > minutes * 60
    values = [0.0, float(signals.received() is not None), float(overtime), *local_sums(next_micro_batches)]
    if not parallel.counts_here():
        return parallel.SumOverAll(values)
    loss = losses.double().sum()
    return parallel.SumOverAll(values, F.pad(loss.reshape(1), (0, len(values) - 1)))


def _what_stops(run: Run, signaled: float, overtime: float) -> str | None:
    """The reason for which this step is the last of this start, if it is."""
    if signaled:
        return signals.reason()
    return f"--exit-duration-in-mins {run.config.logging.exit_duration_in_mins:g}" if overtime else None


def _end_nonfinite(
    run: Run, what: str, reader: BatchReader, micro_batches: list[MicroBatch], losses: list[float]
) -> NoReturn:
    """End without saving; what led to the non-finite loss or gradient norm is written to a file."""
    iteration = run.state.iteration + 1
    path = write_provenance(
        Path(run.config.checkpoint.save or "."),
        what,
        iteration=iteration,
        consumed_samples=run.state.consumed_samples,
        reader=reader,
        micro_batches=micro_batches,
        losses=losses,
    )
    found = f"{what} at iteration {iteration}; its sequences and documents are in {path}"
    run.log.event(found)
    run.log.close()
    raise UserError(
        f"{found}, and the newest checkpoint is from before it: "
        "lower --lr, remove those documents, or use --bf16 instead of --fp16"
    )
