"""Validation of one group: loss as in training, perplexity, and the share of output tokens that are the model's first choice."""

import math

import torch
from torch import nn

from megatron_ft.config.config import Config
from megatron_ft.engine import parallel, signals
from megatron_ft.engine.batches import BatchReader, MicroBatch
from megatron_ft.engine.loss import token_hits, token_losses
from megatron_ft.engine.pipeline import run_micro_batches


def evaluate(
    config: Config,
    model: list[nn.Module],
    rows: BatchReader,
    vocab_size: int | None,
    watchdog: signals.Watchdog | None = None,
) -> dict | None:
    """Evaluate --eval-iters global batches of `rows` from the start, or the whole range once; None when a stop signal came.

    `loss` weighs tokens as training does; `perplexity` is exp of it; `token_accuracy` counts every token of the loss mask alike.
    Rows past the range's end fill the last batch and weigh nothing.
    """
    limit = sequences_to_evaluate(config, rows)
    sums = [0.0] * 4
    for chunk in model:
        chunk.eval()
    try:
        for first in range(0, limit, config.training.global_batch_size):
            following = config.training.global_batch_size if first + config.training.global_batch_size < limit else 0
            micro_batches = rows.read(first, config.training.global_batch_size, following)
            counted = _count(config, model, micro_batches, vocab_size)
            *totals, signalled = parallel.sum_over_all(
                [*(counted if parallel.counts_here() else [0.0] * 4), float(signals.received() is not None)]
            )
            if signalled:
                return None
            sums = [old + new for old, new in zip(sums, totals, strict=True)]
            if watchdog:
                watchdog.alive()
    finally:
        for chunk in model:
            chunk.train()
    loss_sum, weight, hits, tokens = sums
    loss = loss_sum / weight if weight else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": hits / tokens if tokens else math.nan,
        "tokens": int(tokens),
        "rows": limit,
    }


def sequences_to_evaluate(config: Config, rows: BatchReader) -> int:
    """How many of a group's rows --eval-iters takes."""
    every = len(rows.dataset)
    return (
        every
        if config.validation.iters == "full"
        else min(every, int(config.validation.iters) * config.training.global_batch_size)
    )


@torch.no_grad()
def _count(
    config: Config, model: list[nn.Module], micro_batches: list[MicroBatch], vocab_size: int | None
) -> list[float]:
    """[sum of weighted losses, sum of weights, hits, tokens] over this rank's micro-batches; empty off the last stage."""

    def counts_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted = (micro.loss_mask > 0).double()
        hits = token_hits(logits, micro.labels, vocab_size)
        losses = token_losses(logits, micro.labels, vocab_size)
        sums = [losses.double() * micro.weights, micro.weights.double(), hits * counted, counted]
        return logits.new_zeros(()), torch.stack([x.sum() for x in sums])

    counts = run_micro_batches(config, model, micro_batches, counts_of, forward_only=True)
    return [] if counts is None else counts.sum(0).tolist()
