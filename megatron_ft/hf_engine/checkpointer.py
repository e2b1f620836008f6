"""Checkpoints of `--engine transformers`: each one is a Hugging Face directory or a PEFT adapter.

    iter_0000250/config.json, model.safetensors, tokenizer.json ...     or
    iter_0000250/adapter_config.json, adapter_model.safetensors ...
    iter_0000250/.metadata, __0_0.distcp ...    the optimizer, by torch.distributed.checkpoint
    iter_0000250/manifest.json                  counters, flags, checksums

Leases, retention, verification and what may differ on a resume are those of every engine
(checkpoint/checkpointer.py). The optimizer's state is read by any number of ranks, sharded or not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.collective import Collective
from megatron_ft.checkpoint.resume import Start, choose_first_start
from megatron_ft.checkpoint.train_state import COUNTERS, BestCheckpoint, TrainState
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import sync_path
from megatron_ft.files.checksum import describe_file
from megatron_ft.hf_engine.model import positions_of
from megatron_ft.hf_engine.start import StartingPoint, find_start
from megatron_ft.hf_engine.trainer import PackedTrainer
from megatron_ft.tokenizer.export import write_tokenizer
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.weights.manifest import Manifest, git_revision, now, versions

OPTIMIZER = "optimizer"


class HfCheckpointer(Checkpointer):
    """Keeps the checkpoints of one run of transformers' Trainer.

    `load` builds the model of a directory, with the adapters of another if one is given.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        load: Callable[[Path, Path | None], torch.nn.Module],
        *,
        sequences_per_epoch: int,
    ) -> None:
        super().__init__(config, None, tokenizer.config_ids, sequences_per_epoch=sequences_per_epoch)
        self.tokenizer, self.load = tokenizer, load
        self._logged: set[str] = set()
        self.trainer: PackedTrainer | None = None
        self._resumed: tuple[Path, Manifest] | None = None

    # ---- start -----------------------------------------------------------------------------------

    def _first_start(self, state: TrainState) -> Start:
        start = self.ranks.on_rank_0(lambda: choose_first_start(self.config))
        load, iteration = self.config.checkpoint.load, self.config.checkpoint.load_iteration
        assert load is not None  # arguments.py
        point = self.ranks.on_rank_0(lambda: find_start(load, iteration, adapters=bool(self.config.lora.rank)))
        self._set_base(point)
        state.model = [self.ranks.each(lambda: self.load(point.model, point.adapters))]
        if point.adapters:
            start.reasons.append(f"{point.adapters}: adapters of rank {self.config.lora.rank}, training continues")
        return start

    def _set_base(self, point: StartingPoint) -> None:
        if self.config.lora.rank:
            self._base = self.ranks.on_rank_0(point.describe_base)

    def _load(self, state: TrainState, where: Path, manifest: Manifest) -> list[str]:
        lines = []
        if manifest.base:
            point = self.ranks.on_rank_0(lambda: self._find_base(manifest.base or {}, where))
            self._set_base(point)
            state.model = [self.ranks.each(lambda: self.load(point.model, where))]
            lines.append(f"base: {point.model}")
        else:
            state.model = [self.ranks.each(lambda: self.load(where, None))]
        for name in COUNTERS:
            setattr(state, name, manifest.state[name])
        best = manifest.state["best"]
        state.best = BestCheckpoint.from_dict(best) if best else None
        self._resumed = (where, manifest)
        return lines

    def _find_base(self, base: dict[str, Any], where: Path) -> StartingPoint:
        """The model below the adapters in `where`: --load, or where it was. Raises UserError."""
        load = self.config.checkpoint.load
        point = find_start(load or base["path"], self.config.checkpoint.load_iteration, adapters=True)
        if point.describe_base()["fingerprint"] != base.get("fingerprint"):
            raise UserError(
                f"{where}: its adapters were trained on {base['path']}, and {point.model} has other weights; "
                "restore them, or give their location with --load DIR"
            )
        return point

    def restore_optimizer(self, trainer: PackedTrainer, state: TrainState) -> None:
        """Fill optimizer, schedule and loss scale from the checkpoint that the run resumes from."""
        if self._resumed is None:
            return
        where, manifest = self._resumed
        model, optimizer = trainer.model_wrapped, trainer.torch_optimizer
        # Rates, betas and decay are those of this command line.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        content = {OPTIMIZER: get_optimizer_state_dict(model, optimizer)}
        dcp.load(content, checkpoint_id=where)
        set_optimizer_state_dict(model, optimizer, content[OPTIMIZER])
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)
        state.scheduler.num_steps = manifest.state["scheduler_steps"]
        state.scheduler.step(0)
        if trainer.accelerator.scaler is not None and manifest.state["loss_scaler"]:
            trainer.accelerator.scaler.load_state_dict(manifest.state["loss_scaler"])

    # ---- save ------------------------------------------------------------------------------------

    def _bytes_to_save(self, state: TrainState) -> int:
        if self.ranks.rank:
            return 0
        trained = sum(weight.numel() for weight in state.model[0].parameters() if weight.requires_grad)
        return 3 * 4 * trained  # weights and two moments

    def _describe(self, state: TrainState) -> Manifest:
        trainer = self._trained()
        scaler = trainer.accelerator.scaler
        return Manifest(
            iteration=state.iteration,
            shape={},
            args={
                **self.config.values(),
                "engine": self.config.engine,
                "world_size": self.config.parallel.world_size,
                "data_parallel_size": self.config.parallel.data,
            },
            state={
                **{name: getattr(state, name) for name in COUNTERS},
                "best": state.best.to_dict() if state.best else None,
                "scheduler_steps": state.scheduler.num_steps,
                "loss_scaler": scaler.state_dict() if scaler is not None else None,
            },
            layout={"tensor": 1, "pipeline": 1, "context": 1, "data": self.config.parallel.data},
            data=self._data_at_start(),
            base=self._base,
            special_ids=self.special_ids,
            versions=versions(),
            git_revision=git_revision(),
            saved_at=now(),
        )

    def _writer(self, staging: Path, state: TrainState) -> "HfWriter":
        return HfWriter(staging, self._trained(), self.ranks, self._write_tokenizer)

    def _write_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files into a checkpoint; what they differ in is logged once."""
        positions = positions_of(self._trained().model_config) or self.config.data.seq_length
        source = Path(self.config.data.tokenizer_file)
        for line in write_tokenizer(directory, source, self.tokenizer, positions):
            if line not in self._logged:
                self.log(line)
            self._logged.add(line)

    def _trained(self) -> PackedTrainer:
        assert self.trainer is not None
        return self.trainer


class HfWriter:
    """Writes one checkpoint, all ranks together; the interface of rank_files.RankWriter.

    After `start`, either `error` is the reason of a failure, or `files` describes the files whose
    checksums this rank has computed.
    """

    running = False  # never in the background
    entries: list = []  # nothing for torch_dist's own .metadata

    def __init__(
        self,
        staging: Path,
        trainer: PackedTrainer,
        ranks: Collective,
        write_tokenizer: Callable[[Path], None],
    ) -> None:
        self.staging, self.trainer, self.ranks, self.write_tokenizer = staging, trainer, ranks, write_tokenizer
        self.error: str | None = None
        self.files: dict[str, dict] = {}

    def start(self) -> None:
        """Write. Never raises: see `error`."""
        trainer = self.trainer
        weights = full_weights(trainer)
        try:
            if self.ranks.rank == 0:
                save_model(trainer, weights, self.staging)
                self.write_tokenizer(self.staging)
        except OSError as error:
            self.error = f"{error.filename or self.staging}: {error.strerror or error}"
        except Exception as error:  # torch and safetensors report a full disk in their own ways
            self.error = f"{self.staging}: {type(error).__name__}: {error}"
        if any(self.ranks.all_of(self.error)):
            return
        try:
            optimizer = get_optimizer_state_dict(trainer.model_wrapped, trainer.torch_optimizer)
            dcp.save({OPTIMIZER: optimizer}, checkpoint_id=self.staging)
            names = self.ranks.on_rank_0(lambda: sorted(file.name for file in self.staging.iterdir()))
            ours = names[self.ranks.rank :: self.ranks.world_size]
            for name in ours:
                sync_path(self.staging / name)
                self.files[name] = describe_file(self.staging / name)
        except Exception as error:
            self.error = f"{self.staging}: {type(error).__name__}: {str(error).splitlines()[0]}"

    def wait(self) -> None:
        """Nothing is left to wait for."""


def full_weights(trainer: PackedTrainer) -> dict[str, Tensor] | None:
    """Weights by transformers' names on rank 0, gathered if they are sharded; None: not sharded.

    With LoRA only those of the adapters. A collective call.
    """
    if not trainer.is_fsdp_enabled:
        return None
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(trainer.config.lora.rank)
    )
    weights: Any = get_model_state_dict(trainer.model_wrapped, options=options)
    return weights


def save_model(trainer: PackedTrainer, weights: dict[str, Tensor] | None, directory: Path) -> None:
    """Write the Hugging Face directory, or the PEFT adapters; on rank 0."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    options: dict[str, Any] = {"save_embedding_layers": False} if trainer.config.lora.rank else {}
    model.save_pretrained(directory, state_dict=weights, **options)
