"""What of a run goes into a checkpoint and comes back: the model, the optimizer, counters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from megatron_ft.checkpoint import optimizer_state, sharded_state
from megatron_ft.checkpoint.rank_files import read_tensors
from megatron_ft.checkpoint.resume import describe_data
from megatron_ft.config.config import Config
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights.manifest import Manifest, git_revision, now, versions
from megatron_ft.weights.torch_dist_metadata import read_metadata


@dataclass
class TrainState:
    """What a run is made of, and how far it is. `model` holds DDP-wrapped chunks; `best` is {"iteration", "group", "loss", ...}."""

    model: list[nn.Module]
    optimizer: Any
    scheduler: Any
    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    best: dict | None = None
    skipped_iterations: int = 0


COUNTERS = ("iteration", "consumed_samples", "consumed_tokens", "best", "skipped_iterations")


def tensors_to_save(state: TrainState, *, adapters_only: bool) -> list[ShardedTensor | ShardedObject]:
    """This rank's pieces of everything."""
    model, optimizer = sharded_state.tensors_of(state.model, state.optimizer, adapters_only=adapters_only)
    return [*model, *optimizer]


def describe(
    state: TrainState, config: Config, shape: ModelShape, *, base: dict | None, special_ids: dict[str, int | None]
) -> Manifest:
    """The manifest of a checkpoint of this moment, but for its files."""
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
            "best": dict(state.best) if state.best else None,
            "scheduler_steps": state.scheduler.num_steps,
            "optimizer_step": optimizer_state.get_step(state.optimizer),
            "loss_scaler": optimizer_state.get_scaler(state.optimizer),
        },
        layout=sharded_state.layout(),
        data=describe_data(config),
        base=base,
        special_ids=special_ids,
        versions=versions(),
        git_revision=git_revision(),
        saved_at=now(),
    )


def restore(state: TrainState, where: Path, manifest: Manifest) -> None:
    """Fill this rank's part of the run from a checkpoint of any layout, written on any device. Raises UserError, Damaged.

    There are no random states in it: each step seeds itself by its number (`seed_step` in engine/parallel.py).
    """
    saved = manifest.state
    optimizer_state.initialise(state.optimizer)
    model, optimizer = sharded_state.tensors_of(state.model, state.optimizer, adapters_only=bool(manifest.base))
    metadata = read_metadata(where)
    with torch.no_grad():
        read_tensors(where, [*sharded_state.without_objects(model), *optimizer], metadata)
    optimizer_state.refresh_copies(state.optimizer)
    optimizer_state.set_step(state.optimizer, saved["optimizer_step"])
    optimizer_state.set_scaler(state.optimizer, saved["loss_scaler"])
    for name in COUNTERS:
        setattr(state, name, saved[name])
    state.scheduler.num_steps = saved["scheduler_steps"]
    state.scheduler.step(0)  # the rate of this command line's schedule at that point
