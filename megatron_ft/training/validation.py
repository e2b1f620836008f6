"""Validation of one group: the training loss, perplexity, and next-token accuracy."""

import math

from megatron_ft.training import signals
from megatron_ft.training.batches import BatchReader, sequences_to_evaluate
from megatron_ft.training.run import Run
from megatron_ft.training.sums import sum_over_all


def evaluate(run: Run, reader: BatchReader) -> dict[str, float] | None:
    """Evaluate the first --eval-iters global batches of `reader`, or all sequences once.

    `loss` weighs tokens as in training, `perplexity` is exp(loss), `token_accuracy` is the fraction
    of tokens with loss that are the model's first choice. Returns None after a stop signal.
    """
    count, batch_size = sequences_to_evaluate(run.config, reader), run.config.training.global_batch_size
    sums = [0.0] * 4
    with run.engine.evaluating():
        for first in range(0, count, batch_size):
            next_batch_size = batch_size if first + batch_size < count else 0
            counted = run.engine.count(reader.read(first, batch_size, next_batch_size))
            ours = counted if run.engine.counts else [0.0] * 4
            *totals, signaled = sum_over_all([*ours, float(signals.received() is not None)])
            if signaled:
                return None
            sums = [old + new for old, new in zip(sums, totals, strict=True)]
            run.watchdog.alive()
    loss_sum, weight, hits, tokens = sums
    loss = loss_sum / weight if weight else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows float64 at 709
        "token_accuracy": hits / tokens if tokens else math.nan,
        "tokens": int(tokens),
        "rows": count,
    }
