"""The parts of a training run, which the loop in train.py takes, and what an engine does in it."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.config import Config
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.training import signals
from megatron_ft.training.batches import BatchReader, MicroBatch
from megatron_ft.training.schedule import Length


class Engine(Protocol):
    """The model's side of a run: forward and backward passes, on whatever holds the weights.

    `data_parallel_rank`: index of this rank among those that read different sequences. `counts`:
    whether this rank's numbers count, for one rank of each that share a copy of the model.
    """

    @property
    def data_parallel_rank(self) -> int: ...

    @property
    def counts(self) -> bool: ...

    def evaluating(self) -> AbstractContextManager:
        """Within it the model is in evaluation mode."""

    def gathered_weights(self) -> AbstractContextManager:
        """Within it all weights are up to date, to be evaluated or saved."""

    def count(self, micro_batches: list[MicroBatch]) -> list[float]:
        """Over these micro-batches, without gradients: [sum of weighted losses, sum of weights,
        hits, tokens with loss]; meaningful where `counts`."""


@dataclass(frozen=True)
class Totals:
    """Sums over a global batch, of the fields of that name of its micro-batches."""

    weight: float
    loss_tokens: float
    document_tokens: float
    squared_lengths: float


@dataclass
class Run:
    """The parts of a training run.

    `train_batches`: None with --skip-train. `started`: time.monotonic() when the program started.
    `totals_ahead`: those of the next step, None before the first.
    """

    config: Config
    engine: Engine
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
