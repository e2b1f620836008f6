"""What surrounds the forward and backward passes of one optimizer step, in every engine.

step = Step(run)                   # reads the global batch
... forward and backward passes of step.micro_batches, divided by step.totals.weight
step.agree(losses)                 # on its way while the optimizer works
... the optimizer's step
stop = step.finish(...)            # logs it
"""

import math
import threading
import time
from dataclasses import fields
from typing import NoReturn

import torch
import torch.nn.functional as F

from megatron_ft.training import signals
from megatron_ft.training.batches import MicroBatch
from megatron_ft.training.nonfinite_loss import end_nonfinite
from megatron_ft.training.run import Run, Totals
from megatron_ft.training.schedule import global_batch_at
from megatron_ft.training.sums import SumOverAll, sum_over_all

SLOW_SECONDS = 30


def local_sums(micro_batches: list[MicroBatch], counts: bool) -> list[float]:
    """What this rank adds to a step's Totals: its micro-batches' sums, or zeros."""
    return [float(sum(getattr(micro, item.name) for micro in micro_batches if counts)) for item in fields(Totals)]


def announce_slow_first_step(run: Run) -> threading.Timer:
    """Log after SLOW_SECONDS that the run works, and why it waits; cancel the timer before."""
    config = run.config
    reason = "kernels are loaded and compiled in it"
    if not torch.cuda.is_available():
        batch, length = config.training.global_batch_size, config.data.seq_length
        reason = f"it has {batch:,} x {length:,} tokens; --global-batch-size and --seq-length make it shorter"
    text = f"the first step takes over {SLOW_SECONDS} s: {reason}"
    timer = threading.Timer(SLOW_SECONDS, run.log.event, [text])
    timer.daemon = True
    timer.start()
    return timer


class Step:
    """One optimizer step over a global batch.

    `micro_batches` are this rank's, `totals` the sums over all ranks'. The host waits for the
    device once, in `finish`: the sums over the next batch are known from the step before.
    """

    def __init__(self, run: Run) -> None:
        config, state, reader = run.config, run.state, run.train_batches
        assert reader is not None  # only --skip-train has none
        self._run, self._reader = run, reader
        self._slow = None if run.totals_ahead else announce_slow_first_step(run)
        self._begun = time.perf_counter()
        self._batch_size = global_batch_at(config, state.consumed_samples)
        self._following = state.consumed_samples + self._batch_size
        more = self._following < run.length.samples
        self._next_batch_size = global_batch_at(config, self._following) if more else 0
        self.micro_batches = reader.read(state.consumed_samples, self._batch_size, self._next_batch_size)
        self.totals = run.totals_ahead or Totals(*sum_over_all(local_sums(self.micro_batches, run.engine.counts)))
        self._losses = torch.empty(0)

    def agree(self, losses: torch.Tensor) -> None:
        """Exchange what all ranks must know, by one small all-reduce: the step's loss, whether a
        signal came, whether time is up, and the Totals of the next step.

        `losses`: what each micro-batch contributes to the mean, [micro-batches] on the device.
        """
        run = self._run
        ahead = self._reader.read_ahead(self._following, self._next_batch_size) if self._next_batch_size else []
        minutes = run.config.logging.exit_duration_in_mins
        overtime = minutes is not None and time.monotonic() - run.started > minutes * 60
        values = [0.0, float(signals.received() is not None), float(overtime), *local_sums(ahead, run.engine.counts)]
        self._losses, loss = losses, None
        if run.engine.counts:
            loss = F.pad(losses.double().sum().reshape(1), (0, len(values) - 1))
        self._agreement = SumOverAll(values, loss)

    def finish(self, *, lr: float, updated: bool, grad_norm: float, loss_scale: float) -> str | None:
        """Count and log the step; returns what stops the run (a signal, the time limit), the same
        on all ranks, or None.

        `lr`: the learning rate of the step; `updated`: whether the optimizer took it, instead of
        skipping an overflow of fp16; `grad_norm`: before clipping. Raises UserError for a loss or a
        norm that is not finite.
        """
        run, state = self._run, self._run.state
        loss, signaled, overtime, *ahead = self._agreement.result()
        if self._slow:
            self._slow.cancel()
        if not math.isfinite(loss):
            self._end(f"non-finite loss ({loss})", self._losses.tolist())
        run.totals_ahead = Totals(*ahead) if self._next_batch_size else None
        if updated:
            state.scheduler.step(increment=self._batch_size)
            if not math.isfinite(grad_norm):
                self._end(f"non-finite gradient norm ({grad_norm})", [math.nan] * len(self.micro_batches))
        else:
            state.skipped_iterations += 1
        state.iteration += 1
        state.consumed_samples += self._batch_size
        state.consumed_tokens += int(self.totals.document_tokens)
        run.log.step(
            {
                "iteration": state.iteration,
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
                "loss": loss if self.totals.weight else None,
                "lr": lr,
                "grad_norm": grad_norm if updated else None,
                "loss_scale": loss_scale,
                "global_batch_size": self._batch_size,
                "loss_tokens": int(self.totals.loss_tokens),
                "fill_rate": self.totals.document_tokens / (self._batch_size * run.config.data.seq_length),
                "skipped_iterations": state.skipped_iterations,
                "squared_lengths": self.totals.squared_lengths,
                "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                "step_seconds": time.perf_counter() - self._begun,
            }
        )
        if signaled:
            return signals.reason()
        return f"--exit-duration-in-mins {run.config.logging.exit_duration_in_mins:g}" if overtime else None

    def _end(self, what: str, losses: list[float]) -> NoReturn:
        end_nonfinite(self._run, what, self._reader, self.micro_batches, losses)
