"""A run's state on disk: `Checkpointer` starts or resumes it, saves it, and never leaves a directory without a whole checkpoint.

    checkpointer = Checkpointer(config, shape, tokenizer.config_ids)
    start = checkpointer.start(state)        # resumes, or loads weights, or leaves the random start; says which and why
    ... after each step:  if checkpointer.due(state): checkpointer.save(state)
    checkpointer.finish()                    # waits for a save in the background

Every method is collective: all ranks call it at the same step, what is decided is decided on rank 0, and what fails anywhere fails everywhere.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ft.checkpoint import optimizer_state, resume, retention, sharded_state
from megatron_ft.checkpoint.collective import Together
from megatron_ft.checkpoint.lease import SaveDirectoryLease
from megatron_ft.checkpoint.load_weights import known_tokens, load_adapters, load_weights
from megatron_ft.checkpoint.rank_files import RankWriter
from megatron_ft.checkpoint.train_state import BestCheckpoint, TrainState, describe, restore, tensors_to_save
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import describe_file
from megatron_ft.model.shape import ModelShape
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.weights import directory
from megatron_ft.weights.adapters import open_start
from megatron_ft.weights.fingerprint import describe_base
from megatron_ft.weights.manifest import Damaged, Manifest, check_files, read_manifest
from megatron_ft.weights.source import WeightSource
from megatron_ft.weights.torch_dist_metadata import write_metadata

__all__ = ["Checkpointer", "Start", "TrainState"]

FAILURES_IN_A_ROW = 2  # saves that may fail before the run stops


@dataclass
class Start:
    """How a run began: "resume", "weights" or "scratch", and why: the log's first lines."""

    kind: str
    iteration: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass
class _Pending:
    """A save under way."""

    iteration: int
    staging: Path
    writer: RankWriter
    manifest: Manifest
    is_best: bool


class Checkpointer:
    """Keeps the checkpoints of one run in `config.checkpoint.save`. `special_ids` is the tokenizer's `config_ids`; `log` takes a line, only rank 0
    calls it."""

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        special_ids: dict[str, int | None],
        log: Callable[[str], None] = print,
        *,
        sequences_per_epoch: int | None = None,
    ) -> None:
        self.config, self.shape, self.special_ids = config, shape, special_ids
        self.period = (
            config.checkpoint.save_epochs * sequences_per_epoch if config.checkpoint.save_epochs else None
        )  # rows between --save-epochs's saves
        self.save_directory = Path(config.checkpoint.save).absolute() if config.checkpoint.save else None
        self.ranks = Together(config.parallel.timeout_minutes)
        self.log = log
        self.lease: SaveDirectoryLease | None = None
        self.token = ""
        self.failures = self.failures_in_a_row = 0
        self.last_saved = -1
        self._last_save_time, self._last_save_samples = time.monotonic(), 0
        self._pending: _Pending | None = None
        self.weights_iteration = 0  # of the weights that --load gave, where they have a number
        self._base: dict | None = None  # the weights that LoRA adapters belong to

    # ---- start -------------------------------------------------------------------------------------------------------

    def progress(self) -> tuple[int, int]:
        """(iteration, consumed samples) of the checkpoint that `start` will find, as its manifest says; 0, 0 for a first start."""
        manifest = self.ranks.on_rank_0(lambda: resume.newest_manifest(self.config))
        return (manifest.iteration, manifest.state["consumed_samples"]) if manifest else (0, 0)

    def start(self, state: TrainState) -> Start:
        """Resume from --save, else load weights from --load, else leave the random start. Fills `state`; raises UserError."""
        iterations, notes, self.token = self.ranks.on_rank_0(self._take_over)
        start = self._resume(state, iterations, notes) if iterations else self._first_start(state)
        if self.save_directory:
            self._check_free_space(state)
        return start

    def _take_over(self) -> tuple[list[int], list[str], str]:
        """Rank 0: own the save directory, clean what a killed run left; (iterations to resume, notes for the log, the owner's token)."""
        if not self.save_directory:
            return [], [], ""
        iterations, notes = resume.candidates(self.save_directory)
        try:
            self.save_directory.mkdir(parents=True, exist_ok=True)
            self.lease = SaveDirectoryLease(self.save_directory)
            self.lease.claim(self.log)
            leftovers = directory.remove_leftovers(self.save_directory)
        except OSError as error:
            raise UserError(
                f"--save {self.save_directory}: {error.strerror or error}; give a directory that can be written"
            ) from error
        if leftovers:
            notes.append(f"removed what a killed run left unfinished: {', '.join(leftovers)}")
        return iterations, notes, self.lease.token

    def _first_start(self, state: TrainState) -> Start:
        kind, why = self.ranks.on_rank_0(lambda: resume.choose_first_start(self.config))
        lines = [why]
        if kind == "weights":
            lines += self._load_weights(state, self.config.checkpoint.load, self.config.checkpoint.load_iteration)
        optimizer_state.initialise(state.optimizer)
        return Start(kind, 0, lines)

    def _load_weights(self, state: TrainState, path: str, iteration: int | str) -> list[str]:
        def load() -> list[str]:
            source, adapters = open_start(path, iteration, self.config.values())
            number = (adapters or source).iteration
            self.weights_iteration = number if isinstance(number, int) else 0
            if self.config.lora.rank:
                self._check_tokens(source)
            report = load_weights(source, state.model, self.shape.vocab_size)
            lines = [f"{source.path} ({source.kind}): {line}" for line in report.lines()]
            lines += [found.notice for found in (adapters, source) if found and found.notice]
            return [*lines, load_adapters(adapters, state.model)] if adapters else lines

        if self.config.lora.rank:
            self._base = self.ranks.on_rank_0(lambda: describe_base(open_start(path, iteration, self.config.values())[0]))
        lines = self.ranks.everywhere(load)
        optimizer_state.take_weights(state.optimizer)
        return lines

    def _check_tokens(self, base: WeightSource) -> None:
        """Adapters leave the embedding as it is: a token that the base has no weights for would never be learned."""
        tokens, known = self.shape.vocab_size, known_tokens(base)
        if tokens > known:
            raise UserError(
                f"--lora-rank {self.config.lora.rank}: the tokenizer {self.config.data.tokenizer_file} has {tokens} tokens, the base {base.path} has "
                f"weights for {known}, and LoRA trains no embedding: the {tokens - known} new tokens could not be learned; give the base's "
                "own tokenizer, or leave --lora-rank out, or --load a base that has rows for them (transformers' resize_token_embeddings)"
            )

    def _resume(self, state: TrainState, iterations: list[int], notes: list[str]) -> Start:
        """Load the newest whole checkpoint; name and skip damaged ones."""
        damage: list[str] = []
        for iteration in iterations:
            where = directory.iteration_directory(self.save_directory, iteration)
            try:
                manifest = self._verify(where, checksums=self.config.checkpoint.verify)
                differences = self.ranks.on_rank_0(lambda m=manifest, w=where: self._compare(m, w))
                try:
                    lines = self._load(state, where, manifest)
                except Exception:
                    self._verify(where, checksums=True)  # raises Damaged when that is the reason
                    raise
            except Damaged as error:
                damage.append(f"{where.name}: {error}")
                continue
            self.last_saved, self._last_save_samples = iteration, state.consumed_samples
            skipped = iterations[: len(damage)]
            self.ranks.on_rank_0(lambda skipped=skipped, newest=iteration: self._go_on_from(newest, skipped))
            lines = [
                *(f"damaged checkpoint skipped, {line}" for line in damage),
                *notes,
                f"resume: {where} (iteration {iteration}, {manifest.state['consumed_samples']} samples, saved {manifest.saved_at})",
                *lines,
                *(f"changed on resume: {line}" for line in differences),
            ]
            return Start("resume", iteration, lines)
        raise resume.none_is_whole(self.save_directory, damage)

    def _verify(self, where: Path, *, checksums: bool) -> Manifest:
        manifest = self.ranks.on_rank_0(lambda: read_manifest(where))
        wrong = self.ranks.all_of(
            check_files(where, manifest, checksums=checksums, part=self.ranks.rank, parts=self.ranks.world_size)
        )
        wrong = [line for lines in wrong for line in lines]
        if wrong:
            raise Damaged(wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
        return manifest

    def _compare(self, manifest: Manifest, where: Path) -> list[str]:
        changed, others = resume.compare(manifest, self.config, self.shape, resume.describe_data(self.config))
        if changed and not self.config.checkpoint.override_args:
            raise resume.refuse_changes(manifest, self.config, changed, where)
        return [f"{line} (--override-checkpoint-args)" for line in changed] + others

    def _load(self, state: TrainState, where: Path, manifest: Manifest) -> list[str]:
        """Fill `state` from a verified checkpoint; lines for the log."""
        lines = []
        if manifest.base:
            lines += self._load_weights(
                state, *self.ranks.on_rank_0(lambda: resume.find_base(manifest.base, self.config, where))
            )
        self.ranks.everywhere(lambda: restore(state, where, manifest))
        if manifest.layout != sharded_state.layout():
            lines.append(
                f"layout: was {sharded_state.layout_name(manifest.layout)}, is {sharded_state.layout_name(sharded_state.layout())}; "
                "weights and optimizer are resharded"
            )
        return lines

    def _go_on_from(self, newest: int, damaged: list[int]) -> None:
        """Rank 0: put damaged checkpoints aside; tracker and best mark name what was loaded, whatever they named before."""
        save = self.save_directory
        with self.lease.writing():
            for iteration in damaged:
                if directory.iteration_directory(save, iteration).exists():
                    aside = directory.move_damaged(save, iteration)
                    self.log(f"put aside as {aside}; remove it when you have looked")
            best = resume.saved_best(save, newest)
            failure = _failure_of(lambda: directory.write_trackers(save, newest, best))
            if failure:
                self.log(f"warning: {failure}; the tracker file may name what is not there")

    def _check_free_space(self, state: TrainState) -> None:
        """Say at once when the next save cannot fit, and when those that lie there at once later in the run cannot."""
        needed = self.ranks.total(sharded_state.bytes_to_save(state.model, state.optimizer, bool(self._base)))
        self.ranks.on_rank_0(lambda: retention.check_free_space(self.save_directory, needed, self.config, self.log))

    # ---- save --------------------------------------------------------------------------------------------------------

    def due(self, state: TrainState) -> bool:
        """Ask after every step: whether a save is due, the same on all ranks. Finishes a save in the background that is done."""
        self.poll()
        if self.config.checkpoint.save_interval and state.iteration % self.config.checkpoint.save_interval == 0:
            return True
        if self.period and retention.passed_period(self._last_save_samples, state.consumed_samples, self.period):
            return True
        if not self.config.checkpoint.save_interval_mins:
            return False
        minutes = (time.monotonic() - self._last_save_time) / 60
        return self.ranks.on_rank_0(lambda: minutes >= self.config.checkpoint.save_interval_mins)  # one clock for all

    def save(self, state: TrainState, *, best: bool = False) -> bool:
        """Save now; with --async-save the writing goes on in the background. Whether it went well so far.

        A failed save is logged and counted, and training may go on; the second in a row raises UserError.
        """
        if not self.save_directory:
            return False
        if self._pending and self._pending.iteration == state.iteration and not best:
            return True
        self.wait()
        if state.iteration == self.last_saved:
            failure = self.ranks.on_rank_0(lambda: _failure_of(lambda: self._mark_best(state))) if best else None
            return self._failed(failure) if failure else True
        manifest = self.ranks.on_rank_0(
            lambda: describe(state, self.config, self.shape, base=self._base, special_ids=self.special_ids)
        )
        staging = directory.staging_directory(self.save_directory, state.iteration, self.token)
        failure = self.ranks.on_rank_0(lambda: _failure_of(lambda: self._open_staging(staging)))
        if failure:
            return self._failed(failure)
        items = tensors_to_save(state, adapters_only=bool(self._base))
        writer = RankWriter(staging, self.ranks.rank, items, background=self.config.checkpoint.async_save)
        writer.start()
        self._pending = _Pending(state.iteration, staging, writer, manifest, best)
        self._last_save_time, self._last_save_samples = time.monotonic(), state.consumed_samples
        return True if self.config.checkpoint.async_save else self.wait()

    def _open_staging(self, staging: Path) -> None:
        with self.lease.writing():
            staging.mkdir()

    @property
    def writing(self) -> bool:
        """Whether this rank still writes its part of a save in the background."""
        return self._pending is not None and self._pending.writer.running

    def poll(self) -> None:
        """Finish a save in the background if every rank has written its part."""
        if self._pending is None:
            return
        if not self.ranks.total(self.writing):
            self.wait()

    def finish(self) -> None:
        """Wait for a save in the background and give the directory up. Raises UserError when the last save failed."""
        self.wait()
        if self.failures_in_a_row:
            raise UserError(
                f"--save {self.save_directory}: the last save failed, so iteration {self.last_saved if self.last_saved >= 0 else 'none'} "
                "is the newest on disk; make room or mend the permissions, and start the same command again to go on from there"
            )
        self.ranks.on_rank_0(lambda: self.lease.release() if self.lease else None)

    def saved_best(self) -> BestCheckpoint | None:
        """`best` of the state in the best checkpoint on disk, a save in the background included; None when there is none."""
        self.wait()

        def read() -> BestCheckpoint | None:
            best = directory.read_best(self.save_directory) if self.save_directory else None
            if best is not None:
                with contextlib.suppress(Damaged):
                    state = read_manifest(directory.iteration_directory(self.save_directory, best)).state
                    return BestCheckpoint.from_dict(state["best"]) if state["best"] else None
            return None

        return self.ranks.on_rank_0(read)

    def wait(self) -> bool:
        """Wait for a save in the background and commit it. Whether it went well."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        pending.writer.wait()
        writer = pending.writer
        reports = self.ranks.to_rank_0((writer.error, writer.path.name, writer.file, writer.entries))
        failure = self.ranks.on_rank_0(lambda: self._commit(pending, reports))
        if failure:
            return self._failed(failure)
        self.last_saved = pending.iteration
        self.failures_in_a_row = 0
        return True

    def _commit(self, pending: _Pending, reports: list[tuple]) -> str | None:
        """Rank 0: check, name and announce a checkpoint, then delete what it supersedes. What failed, or None."""
        failure = next((error for error, *_ in reports if error), None)
        if failure is None:
            failure = _failure_of(lambda: self._commit_files(pending, reports))
        if failure is not None:
            shutil.rmtree(pending.staging, ignore_errors=True)
        return failure

    def _commit_files(self, pending: _Pending, reports: list[tuple]) -> None:
        save, staging, manifest = self.save_directory, pending.staging, pending.manifest
        write_metadata(staging, [entry for *_, entries in reports for entry in entries])
        manifest.files = {name: file for _, name, file, _ in reports if file}
        for name in (".metadata", "common.pt", "metadata.json"):
            manifest.files[name] = describe_file(staging / name)
        for name, file in manifest.files.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != file["size"]:
                raise OSError(
                    f"{path} is not as its rank wrote it; --save must be on a file system that all nodes share"
                )
        manifest.write(staging)
        with self.lease.writing():
            tokenizer_files.keep(Path(self.config.data.tokenizer_file), save)
            directory.commit(save, pending.iteration, staging)
            replace_file(save / directory.TRACKER, str(pending.iteration).encode())
            if pending.is_best:
                replace_file(save / directory.BEST, str(pending.iteration).encode())
            retention.delete_superseded(save, self.config, self.period, self.log)
        self.log(f"saved iteration {pending.iteration} to {directory.iteration_directory(save, pending.iteration)}")

    def _mark_best(self, state: TrainState) -> None:
        """Rank 0: write into a checkpoint that is there already that it is the best."""
        where = directory.iteration_directory(self.save_directory, state.iteration)
        with self.lease.writing():
            manifest = read_manifest(where)
            manifest.state["best"] = state.best.to_dict() if state.best else None
            manifest.write(where)
            replace_file(self.save_directory / directory.BEST, str(state.iteration).encode())

    def _failed(self, reason: str) -> bool:
        self.failures += 1
        self.failures_in_a_row += 1
        newest = f"iteration {self.last_saved} is the newest whole one" if self.last_saved >= 0 else "none is whole yet"
        if self.ranks.rank == 0:
            self.log(
                f"warning: a checkpoint could not be saved ({reason}); {newest}; failed saves so far: {self.failures}"
            )
        if self.failures_in_a_row >= FAILURES_IN_A_ROW:
            raise UserError(
                f"--save {self.save_directory}: {FAILURES_IN_A_ROW} saves in a row failed ({reason}); {newest}; "
                "make room or mend the permissions, and start the same command again"
            )
        return False


def _failure_of(work: Callable[[], Any]) -> str | None:
    """Run what may fail for want of space or permission; the reason, or None."""
    try:
        work()
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None
