"""Validation of one group: the training loss, perplexity, and next-token accuracy."""

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
    reader: BatchReader,
    vocab_size: int | None,
    watchdog: signals.Watchdog | None = None,
) -> dict[str, float] | None:
    """Evaluate the first --eval-iters global batches of `reader`, or all sequences once.

    `loss` weighs tokens as in training, `perplexity` is exp(loss), `token_accuracy` is the fraction
    of tokens with loss that are the model's first choice. Returns None after a stop signal.
    """
    count, batch_size = sequences_to_evaluate(config, reader), config.training.global_batch_size
    sums = [0.0] * 4
    for chunk in model:
        chunk.eval()
    try:
        for first in range(0, count, batch_size):
            next_batch_size = batch_size if first + batch_size < count else 0
            micro_batches = reader.read(first, batch_size, next_batch_size)
            counted = _count(config, model, micro_batches, vocab_size)
            *totals, signaled = parallel.sum_over_all(
                [*(counted if parallel.counts_here() else [0.0] * 4), float(signals.received() is not None)]
            )
            if signaled:
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
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows float64 at 709
        "token_accuracy": hits / tokens if tokens else math.nan,
        "tokens": int(tokens),
        "rows": count,
    }


def sequences_to_evaluate(config: Config, reader: BatchReader) -> int:
    """Sequences of a group that --eval-iters covers."""
    available = len(reader.dataset)
    if config.validation.iters == "full":
        return available
    return min(available, int(config.validation.iters) * config.training.global_batch_size)


@torch.no_grad()
def _count(
    config: Config, model: list[nn.Module], micro_batches: list[MicroBatch], vocab_size: int | None
) -> list[float]:
    """Over this rank's micro-batches: [sum of weighted losses, sum of weights, hits, tokens with
    loss]; empty except on the last pipeline stage."""

    def counts_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted = (micro.loss_mask > 0).double()
        hits = token_hits(logits, micro.labels, vocab_size)
        losses = token_losses(logits, micro.labels, vocab_size)
        sums = [losses.double() * micro.weights, micro.weights.double(), hits * counted, counted]
        return logits.new_zeros(()), torch.stack([x.sum() for x in sums])

    counts = run_micro_batches(config, model, micro_batches, counts_of, forward_only=True)
    return [] if counts is None else counts.sum(0).tolist()
