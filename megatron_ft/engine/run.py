"""The parts of a training run, which run.py of the package builds and the loop takes."""

from dataclasses import dataclass

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.config import Config
from megatron_ft.engine import signals
from megatron_ft.engine.batches import BatchReader
from megatron_ft.engine.schedule import Length
from megatron_ft.metrics.metrics import MetricsLog


@dataclass(frozen=True)
class Totals:
    """Sums over a global batch, of the fields of that name of its micro-batches."""

    weight: float
    loss_tokens: float
    document_tokens: float
    squared_lengths: float


@dataclass
class Run:
    """The parts of a training run; run.py builds them.

    `vocab_size`: columns of the logits that take part in the softmax; None: all, padding included.
    `train_batches`: None with --skip-train. `started`: time.monotonic() when the program started.
    `totals_ahead`: those of the next step, None before the first.
    """

    config: Config
    vocab_size: int | None
    length: Length
    state: TrainState
    checkpointer: Checkpointer
    log: MetricsLog
    watchdog: signals.Watchdog
    train_batches: BatchReader | None
    valid_batches: dict[str, BatchReader]
    test_batches: dict[str, BatchReader]
    started: float = 0.0
    totals_ahead: Totals | None = None
