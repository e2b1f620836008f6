"""What a checkpoint stores of a run and restores: the model, the optimizer, counters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel

from megatron_ft.checkpoint import optimizer_state, sharded_state
from megatron_ft.checkpoint.rank_files import read_tensors
from megatron_ft.config.config import Config
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights.manifest import Manifest, git_revision, now, versions
from megatron_ft.weights.torch_dist_metadata import read_metadata


@dataclass(frozen=True)
class ValidationData:
    """What a validation loss was measured on; losses measured on other data are not comparable.

    `group`: the validation group. `sequences`: packed sequences evaluated. `tokens`: tokens of the
    group. Checkpoints of older versions have no `sequences` and `tokens`: None.
    """

    group: str
    sequences: int | None = None
    tokens: int | None = None

    def comparable(self, other: "ValidationData") -> bool:
        """Whether both are the same data, as far as both are known."""
        pairs = ((self.group, other.group), (self.sequences, other.sequences), (self.tokens, other.tokens))
        return all(ours == theirs for ours, theirs in pairs if ours is not None and theirs is not None)

    def __str__(self) -> str:
        return f"group {self.group} ({self.sequences} sequences of a group of {self.tokens} tokens)"


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The checkpoint with the lowest validation loss so far.

    `data`: what the loss was measured on. `waited`: validations since then without improvement.
    `validated`: iteration of the last validation.
    """

    data: ValidationData
    loss: float
    iteration: int
    waited: int = 0
    validated: int

    def not_improved(self, iteration: int) -> "BestCheckpoint":
        """The same after a validation at `iteration` without a lower loss."""
        return replace(self, waited=self.waited + 1, validated=iteration)

    def to_dict(self) -> dict[str, Any]:
        """The `best` of a manifest's `state`."""
        data = {"group": self.data.group, "rows": self.data.sequences, "tokens": self.data.tokens}
        return {
            **{name: value for name, value in data.items() if value is not None},
            "loss": self.loss,
            "iteration": self.iteration,
            "waited": self.waited,
            "validated": self.validated,
        }

    @classmethod
    def from_dict(cls, best: dict[str, Any]) -> "BestCheckpoint":
        """The inverse of `to_dict`."""
        return cls(
            data=ValidationData(best["group"], best.get("rows"), best.get("tokens")),
            loss=best["loss"],
            iteration=best["iteration"],
            waited=best["waited"],
            validated=best["validated"],
        )


@dataclass
class TrainState:
    """What a training step changes: the model in DDP-wrapped chunks, the optimizer, the schedule,
    and the counters."""

    model: list[DistributedDataParallel]
    optimizer: Any
    scheduler: Any
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    best: BestCheckpoint | None = None
    skipped_iterations: int = 0


COUNTERS = ("iteration", "consumed_samples", "consumed_tokens", "skipped_iterations")


def tensors_to_save(state: TrainState, *, adapters_only: bool) -> list[ShardedTensor | ShardedObject]:
    """This rank's pieces of model and optimizer."""
    model, optimizer = sharded_state.tensors_of(state.model, state.optimizer, adapters_only=adapters_only)
    return [*model, *optimizer]


def describe(
    state: TrainState,
    config: Config,
    shape: ModelShape,
    *,
    data: dict[str, str],
    base: dict | None,
    special_ids: dict[str, int | None],
) -> Manifest:
    """The manifest of a checkpoint of `state`, without its files; `data` as `resume.describe_data`
    found it when the run began."""
    counters = {name: getattr(state, name) for name in COUNTERS}
    return Manifest(
        iteration=state.iteration,
        shape=shape.as_dict(),
        args={
            **config.values(),
            "world_size": config.parallel.world_size,
            "data_parallel_size": config.parallel.data,
        },
        state={
            **counters,
            "best": state.best.to_dict() if state.best else None,
            "scheduler_steps": state.scheduler.num_steps,
            "optimizer_step": optimizer_state.get_step(state.optimizer),
            "loss_scaler": optimizer_state.get_scaler(state.optimizer),
        },
        layout=sharded_state.layout(),
        data=data,
        base=base,
        special_ids=special_ids,
        versions=versions(),
        git_revision=git_revision(),
        saved_at=now(),
    )


def restore(state: TrainState, where: Path, manifest: Manifest) -> None:
    """Fill this rank's part of the run from a checkpoint of any layout, written on any device.

    Checkpoints contain no random states: each step seeds itself by its number (`seed_step` in
    engine/parallel.py). Raises UserError, Damaged.
    """
    saved = manifest.state
    optimizer_state.initialize(state.optimizer)
    model, optimizer = sharded_state.tensors_of(state.model, state.optimizer, adapters_only=bool(manifest.base))
    metadata = read_metadata(where)
    with torch.no_grad():
        read_tensors(where, [*sharded_state.without_objects(model), *optimizer], metadata)
    optimizer_state.refresh_copies(state.optimizer)
    optimizer_state.set_step(state.optimizer, saved["optimizer_step"])
    optimizer_state.set_scaler(state.optimizer, saved["loss_scaler"])
    for name in COUNTERS:
        setattr(state, name, saved[name])
    state.best = BestCheckpoint.from_dict(saved["best"]) if saved["best"] else None
    state.scheduler.num_steps = saved["scheduler_steps"]
    state.scheduler.step(0)  # sets the learning rate of this command line's schedule
