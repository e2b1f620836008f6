"""The save directory of one run, as rank 0 changes it: claim, commit, mark the best, release.

Every step that others can see is taken while the lease is held, so a run that has lost the
directory cannot change it.
"""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.checkpoint import resume, retention
from megatron_ft.checkpoint.lease import SaveDirectoryLease
from megatron_ft.checkpoint.rank_files import Writer
from megatron_ft.checkpoint.train_state import BestCheckpoint
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import describe_file
from megatron_ft.files.os_error import remedy
from megatron_ft.tokenizer import files as tokenizer_files
from megatron_ft.weights import directory
from megatron_ft.weights.manifest import Damaged, Manifest, read_manifest
from megatron_ft.weights.torch_dist_metadata import StoredChunk, write_metadata


@dataclass(frozen=True)
class Claim:
    """What a run finds when it claims the directory.

    `token` is the owner's, `iterations` are those to resume from, newest first, and `notes` lines
    for the log.
    """

    token: str
    iterations: list[int]
    notes: list[str]


@dataclass(frozen=True)
class RankReport:
    """What one rank has written into a checkpoint, or the error that kept it from doing so."""

    error: str | None
    files: dict[str, dict]  # by name: size and sha256
    chunks: list[StoredChunk]  # for torch_dist's `.metadata`; no rank has any in another format

    @classmethod
    def of(cls, writer: Writer) -> "RankReport":
        """The report of a writer that has finished."""
        return cls(writer.error, writer.files, writer.entries)


class SaveDirectory:
    """The directory of --save. Called on rank 0 only, except for `path`.

    `period` is the number of sequences between the saves of --save-epochs, None without them.
    """

    def __init__(self, path: Path, config: Config, period: float | None, log: Callable[[str], None]) -> None:
        self.path = path
        self.config, self.period, self.log = config, period, log
        self._lease = SaveDirectoryLease(path)

    def claim(self) -> Claim:
        """Become the owner and remove what a killed run left unfinished. Raises UserError."""
        candidates = resume.candidates(self.path)
        notes = list(candidates.notes)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lease.claim(self.log)
            removed = directory.remove_leftovers(self.path)
        except OSError as error:
            raise UserError(
                f"--save {self.path}: {error.strerror or error}; "
                f"{remedy(error, 'give a directory that can be written')}"
            ) from error
        if removed:
            notes.append(f"removed what a killed run left unfinished: {', '.join(removed)}")
        return Claim(self._lease.token, candidates.iterations, notes)

    def continue_from(self, newest: int, damaged: Sequence[int]) -> None:
        """Rename damaged checkpoints; make tracker and best mark name what was loaded."""
        with self._lease.writing():
            for iteration in damaged:
                if directory.iteration_directory(self.path, iteration).exists():
                    renamed = directory.move_damaged(self.path, iteration)
                    self.log(f"damaged checkpoint moved to {renamed}; remove it once you have looked at it")
            best = resume.saved_best(self.path, newest)
            failure = failure_of(lambda: directory.write_trackers(self.path, newest, best))
            if failure:
                self.log(f"warning: {failure}; the tracker file may name a checkpoint that does not exist")

    def open_staging(self, staging: Path) -> str | None:
        """Make the directory that ranks write an iteration into; what failed, or None."""

        def make() -> None:
            with self._lease.writing():
                staging.mkdir()

        return failure_of(make)

    def commit(self, staging: Path, manifest: Manifest, reports: Sequence[RankReport], *, is_best: bool) -> str | None:
        """Check what the ranks wrote, name it, announce it, delete what it supersedes.

        Returns what failed, or None. After a failure, nothing of the checkpoint is left.
        """
        failure = next((report.error for report in reports if report.error), None)
        if failure is None:
            failure = failure_of(lambda: self._commit(staging, manifest, reports, is_best))
        if failure is not None:
            shutil.rmtree(staging, ignore_errors=True)
        return failure

    def _commit(self, staging: Path, manifest: Manifest, reports: Sequence[RankReport], is_best: bool) -> None:
        manifest.files = {name: file for report in reports for name, file in report.files.items()}
        if chunks := [chunk for report in reports for chunk in report.chunks]:
            write_metadata(staging, chunks)
            for name in (".metadata", "common.pt", "metadata.json"):
                manifest.files[name] = describe_file(staging / name)
        for name, file in manifest.files.items():
            path = staging / name
            if not path.is_file() or path.stat().st_size != file["size"]:
                raise OSError(
                    f"{path} is not as its rank wrote it; --save must be on a file system that all nodes share"
                )
        manifest.write(staging)
        iteration = manifest.iteration
        with self._lease.writing():
            tokenizer_files.keep(Path(self.config.data.tokenizer_file), self.path)
            directory.commit(self.path, iteration, staging)
            replace_file(self.path / directory.TRACKER, str(iteration).encode())
            if is_best:
                replace_file(self.path / directory.BEST, str(iteration).encode())
            retention.delete_superseded(self.path, self.config, self.period, self.log)
        self.log(f"saved iteration {iteration} to {directory.iteration_directory(self.path, iteration)}")

    def mark_best(self, iteration: int, best: BestCheckpoint | None) -> str | None:
        """Record in an existing checkpoint that it is the best; what failed, or None."""

        def mark() -> None:
            where = directory.iteration_directory(self.path, iteration)
            with self._lease.writing():
                manifest = read_manifest(where)
                manifest.state["best"] = best.to_dict() if best else None
                manifest.write(where)
                replace_file(self.path / directory.BEST, str(iteration).encode())

        return failure_of(mark)

    def saved_best(self) -> BestCheckpoint | None:
        """The best checkpoint on disk, None if none is known."""
        best = directory.read_best(self.path)
        if best is None:
            return None
        with contextlib.suppress(Damaged):
            recorded = read_manifest(directory.iteration_directory(self.path, best)).state["best"]
            return BestCheckpoint.from_dict(recorded) if recorded else None
        return None

    def release(self) -> None:
        """Give up the lease."""
        self._lease.release()


def failure_of(work: Callable[[], object]) -> str | None:
    """Run what may fail for lack of space or permission; the reason, or None."""
    try:
        work()
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None
