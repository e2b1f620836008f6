"""The state of a run on disk: `Checkpointer` starts or resumes the run and saves it.

    checkpointer = Checkpointer(config, shape, tokenizer.config_ids)
    start = checkpointer.start(state)    # resumes, or loads weights, or keeps random weights
    ... after each step:  if checkpointer.due(state): checkpointer.save(state)
    checkpointer.finish()                # waits for a save in the background

Once a checkpoint is saved, the directory always contains a complete one. Every method is
collective: all ranks call it at the same step, rank 0 decides, and a failure on any rank is raised
on every rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ft.checkpoint import optimizer_state, resume, retention, sharded_state
from megatron_ft.checkpoint.collective import Collective
from megatron_ft.checkpoint.load_weights import known_tokens, load_adapters, load_weights
from megatron_ft.checkpoint.rank_files import RankWriter, Writer
from megatron_ft.checkpoint.resume import Start, WeightsLocation
from megatron_ft.checkpoint.save_directory import Claim, RankReport, SaveDirectory
from megatron_ft.checkpoint.train_state import BestCheckpoint, TrainState, describe, restore, tensors_to_save
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.model.shape import ModelShape
from megatron_ft.weights import directory
from megatron_ft.weights.adapters import open_start
from megatron_ft.weights.fingerprint import describe_base
from megatron_ft.weights.manifest import Damaged, Manifest, check_files, read_manifest
from megatron_ft.weights.source import WeightSource

FAILURES_IN_A_ROW = 2  # saves that may fail before the run stops


@dataclass
class _Pending:
    """A save in progress."""

    saves: SaveDirectory
    staging: Path
    writer: Writer
    manifest: Manifest
    is_best: bool


class Checkpointer:
    """Keeps the checkpoints of one run in `config.checkpoint.save`.

    `special_ids` is the tokenizer's `config_ids`. `log` is called with single lines, on rank 0
    only. `sequences_per_epoch` is needed for --save-epochs.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape | None,
        special_ids: dict[str, int | None],
        log: Callable[[str], None] = print,
        *,
        sequences_per_epoch: int | None = None,
    ) -> None:
        self.config, self.shape, self.special_ids = config, shape, special_ids
        self.log = log
        epochs = config.checkpoint.save_epochs
        # sequences between the saves of --save-epochs
        self.period = epochs * sequences_per_epoch if epochs and sequences_per_epoch is not None else None
        self.save_directory: SaveDirectory | None = None
        if config.checkpoint.save:
            path = Path(config.checkpoint.save).absolute()
            # `self.log` is replaced once the run's log is open
            self.save_directory = SaveDirectory(path, config, self.period, lambda line: self.log(line))
        self.ranks = Collective(config.parallel.timeout_minutes)
        self.token = ""
        self.failures = self.failures_in_a_row = 0
        self.last_saved = -1
        self._last_save_time, self._last_save_samples = time.monotonic(), 0
        self._pending: _Pending | None = None
        self.weights_iteration = 0  # of the weights from --load, if they have a number
        self._base: dict | None = None  # the weights that LoRA adapters belong to
        self._data: dict[str, str] | None = None

    # ---- start -----------------------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """(iteration, sequences read) of the checkpoint that `start` will find; (0, 0) for none.

        Reads manifests only; `start` may find that checkpoint damaged and use an older one.
        """
        manifest = self.ranks.on_rank_0(lambda: resume.newest_manifest(self.config))
        return (manifest.iteration, manifest.state["consumed_samples"]) if manifest else (0, 0)

    def start(self, state: TrainState) -> Start:
        """Fill `state`: resume from --save, or load weights from --load, or keep random weights.

        Raises UserError if none of these is possible, and if a checkpoint does not fit on the disk.
        """
        saves = self.save_directory
        if saves is None:
            return self._first_start(state)
        claim = self.ranks.on_rank_0(saves.claim)
        self.token = claim.token
        self.ranks.on_rank_0(self._data_at_start)
        start = self._resume(state, saves, claim) if claim.iterations else self._first_start(state)
        needed = self.ranks.total(self._bytes_to_save(state))
        self.ranks.on_rank_0(lambda: retention.check_free_space(saves.path, needed, self.config, self.log))
        return start

    def _first_start(self, state: TrainState) -> Start:
        start = self.ranks.on_rank_0(lambda: resume.choose_first_start(self.config))
        if self.config.checkpoint.load and start.kind == "weights":
            location = WeightsLocation(self.config.checkpoint.load, self.config.checkpoint.load_iteration)
            start.reasons += self._load_weights(state, location)
        optimizer_state.initialize(state.optimizer)
        return start

    def _load_weights(self, state: TrainState, location: WeightsLocation) -> list[str]:
        """Load model weights from another checkpoint; lines for the log."""

        def load() -> list[str]:
            source, adapters = open_start(location.path, location.iteration, self.config.values())
            number = (adapters or source).iteration
            self.weights_iteration = number if isinstance(number, int) else 0
            if self.config.lora.rank:
                self._check_tokens(source)
            assert self.shape is not None
            report = load_weights(source, state.model, self.shape.vocab_size)
            lines = [f"{source.path} ({source.kind}): {line}" for line in report.lines()]
            lines += [found.notice for found in (adapters, source) if found and found.notice]
            return [*lines, load_adapters(adapters, state.model)] if adapters else lines

        if self.config.lora.rank:
            self._base = self.ranks.on_rank_0(
                lambda: describe_base(open_start(location.path, location.iteration, self.config.values())[0])
            )
        lines = self.ranks.everywhere(load)
        optimizer_state.take_weights(state.optimizer)
        return lines

    def _check_tokens(self, base: WeightSource) -> None:
        """Raise UserError for tokens that the base has no weights for.

        Adapters leave the embedding as it is, so these tokens would never be learned.
        """
        assert self.shape is not None
        tokens, known = self.shape.vocab_size, known_tokens(base)
        if tokens > known:
            raise UserError(
                f"--lora-rank {self.config.lora.rank}: the tokenizer {self.config.data.tokenizer_file} has {tokens} "
                f"tokens, the base {base.path} has weights for {known}, and LoRA does not train the embedding: "
                f"the {tokens - known} new tokens could not be learned; give the base's own tokenizer, or leave "
                "--lora-rank out, or --load a base that has embedding rows for them (transformers' "
                "resize_token_embeddings)"
            )

    def _resume(self, state: TrainState, saves: SaveDirectory, claim: Claim) -> Start:
        """Load the newest complete checkpoint, reporting damaged ones and skipping them."""
        damage: list[str] = []
        for iteration in claim.iterations:
            where = directory.iteration_directory(saves.path, iteration)
            try:
                manifest = self._verify(where, checksums=self.config.checkpoint.verify)
                differences = self.ranks.on_rank_0(partial(self._compare, manifest, where))
                try:
                    lines = self._load(state, where, manifest)
                except Exception:
                    self._verify(where, checksums=True)  # raises Damaged if that is the reason
                    raise
            except Damaged as error:
                damage.append(f"{where.name}: {error}")
                continue
            self.last_saved, self._last_save_samples = iteration, state.consumed_samples
            self.ranks.on_rank_0(partial(saves.continue_from, iteration, claim.iterations[: len(damage)]))
            samples = manifest.state["consumed_samples"]
            lines = [
                *(f"damaged checkpoint skipped, {line}" for line in damage),
                *claim.notes,
                f"resume: {where} (iteration {iteration}, {samples} samples, saved {manifest.saved_at})",
                *lines,
                *(f"changed on resume: {line}" for line in differences),
            ]
            return Start("resume", iteration, lines)
        raise resume.all_damaged(saves.path, damage)

    def _verify(self, where: Path, *, checksums: bool) -> Manifest:
        """The manifest of a checkpoint, whose files the ranks check together. Raises Damaged."""
        manifest = self.ranks.on_rank_0(lambda: read_manifest(where))
        wrong_files = self.ranks.all_of(
            check_files(where, manifest, checksums=checksums, part=self.ranks.rank, parts=self.ranks.world_size)
        )
        wrong = [line for lines in wrong_files for line in lines]
        if wrong:
            raise Damaged(wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
        return manifest

    def _compare(self, manifest: Manifest, where: Path) -> list[str]:
        """Lines on what differs from the saved run. Raises UserError for what must not."""
        differences = resume.compare(manifest, self.config, self.shape, self._data_at_start())
        if differences.refused and not self.config.checkpoint.override_args:
            raise resume.refuse_changes(manifest, self.config, differences.refused, where)
        return [f"{line} (--override-checkpoint-args)" for line in differences.refused] + differences.allowed

    def _data_at_start(self) -> dict[str, str]:
        """What the run reads, as it was when the run began: a later edit must not be recorded as
        what the steps before it were trained on."""
        if self._data is None:
            self._data = resume.describe_data(self.config)
        return self._data

    def _load(self, state: TrainState, where: Path, manifest: Manifest) -> list[str]:
        """Fill `state` from a verified checkpoint; lines for the log."""
        lines = []
        base = manifest.base
        if base:
            location = self.ranks.on_rank_0(lambda: resume.find_base(base, self.config, where))
            lines += self._load_weights(state, location)
        self.ranks.everywhere(lambda: restore(state, where, manifest))
        saved, now = manifest.layout, sharded_state.layout()
        if saved != now:
            lines.append(
                f"layout: was {sharded_state.layout_name(saved)}, is {sharded_state.layout_name(now)}; "
                "weights and optimizer are resharded"
            )
        return lines

    # ---- save ------------------------------------------------------------------------------------

    def due(self, state: TrainState) -> bool:
        """Whether to save after this step; call it after every one. The same on all ranks.

        Also completes a save in the background if it has finished.
        """
        self.poll()
        checkpoint = self.config.checkpoint
        if checkpoint.save_interval and state.iteration % checkpoint.save_interval == 0:
            return True
        if self.period and retention.passed_period(self._last_save_samples, state.consumed_samples, self.period):
            return True
        interval = checkpoint.save_interval_mins
        if not interval:
            return False
        minutes = (time.monotonic() - self._last_save_time) / 60
        return self.ranks.on_rank_0(lambda: minutes >= interval)  # by one clock for all ranks

    def save(self, state: TrainState, *, best: bool = False) -> bool:
        """Save now; with --async-save, ranks write in the background. Whether it succeeded so far.

        A failed save is logged and counted, and training may continue; the second one in a row
        raises UserError. With `best`, the checkpoint is marked as the best.
        """
        saves = self.save_directory
        if saves is None:
            return False
        if self._pending and self._pending.manifest.iteration == state.iteration and not best:
            return True
        self.wait()
        if state.iteration == self.last_saved:
            if not best:
                return True
            failure = self.ranks.on_rank_0(lambda: saves.mark_best(state.iteration, state.best))
            return self._failed(saves, failure) if failure else True
        manifest = self.ranks.on_rank_0(lambda: self._describe(state))
        staging = directory.staging_directory(saves.path, state.iteration, self.token)
        failure = self.ranks.on_rank_0(lambda: saves.open_staging(staging))
        if failure:
            return self._failed(saves, failure)
        writer = self._writer(staging, state)
        writer.start()
        self._pending = _Pending(saves, staging, writer, manifest, best)
        self._last_save_time, self._last_save_samples = time.monotonic(), state.consumed_samples
        return True if self.config.checkpoint.async_save else self.wait()

    def _bytes_to_save(self, state: TrainState) -> int:
        """Bytes of this rank's part of a checkpoint."""
        return sharded_state.bytes_to_save(state.model, state.optimizer, bool(self._base))

    def _describe(self, state: TrainState) -> Manifest:
        """The manifest of a checkpoint, without its files."""
        assert self.shape is not None
        data = self._data_at_start()
        return describe(state, self.config, self.shape, data=data, base=self._base, special_ids=self.special_ids)

    def _writer(self, staging: Path, state: TrainState) -> Writer:
        """What writes this rank's part of a checkpoint."""
        items = tensors_to_save(state, adapters_only=bool(self._base))
        return RankWriter(staging, self.ranks.rank, items, background=self.config.checkpoint.async_save)

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its part of a save in the background."""
        return self._pending is not None and self._pending.writer.running

    def poll(self) -> None:
        """Complete a save in the background if every rank has written its part."""
        if self._pending is not None and not self.ranks.total(self.writing):
            self.wait()

    def wait(self) -> bool:
        """Wait for a save in the background and commit it. Whether it succeeded."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        pending.writer.wait()
        reports = self.ranks.to_rank_0(RankReport.of(pending.writer))
        failure = self.ranks.on_rank_0(
            lambda: pending.saves.commit(pending.staging, pending.manifest, reports, is_best=pending.is_best)
        )
        if failure:
            return self._failed(pending.saves, failure)
        self.last_saved = pending.manifest.iteration
        self.failures_in_a_row = 0
        return True

    def finish(self) -> None:
        """Wait for a save in the background and release the directory.

        Raises UserError if the last save failed.
        """
        self.wait()
        saves = self.save_directory
        if saves is None:
            return
        if self.failures_in_a_row:
            raise UserError(
                f"--save {saves.path}: the last save failed; {self._newest()}; "
                "free disk space or inodes, or fix the permissions, and run the same command again to resume from there"
            )
        self.ranks.on_rank_0(saves.release)

    def saved_best(self) -> BestCheckpoint | None:
        """The best checkpoint on disk, after a save in the background; None if there is none."""
        self.wait()
        saves = self.save_directory
        return self.ranks.on_rank_0(saves.saved_best) if saves else None

    def _newest(self) -> str:
        if self.last_saved < 0:
            return "there is no complete checkpoint yet"
        return f"iteration {self.last_saved} is the newest complete checkpoint"

    def _failed(self, saves: SaveDirectory, reason: str) -> bool:
        """Count and log a failed save: False. Raises UserError for the second one in a row."""
        self.failures += 1
        self.failures_in_a_row += 1
        if self.ranks.rank == 0:
            self.log(
                f"warning: a checkpoint could not be saved ({reason}); {self._newest()}; "
                f"failed saves so far: {self.failures}"
            )
        if self.failures_in_a_row >= FAILURES_IN_A_ROW:
            raise UserError(
                f"--save {saves.path}: {FAILURES_IN_A_ROW} saves in a row failed ({reason}); {self._newest()}; "
                "free disk space or inodes, or fix the permissions, and run the same command again"
            )
        return False
