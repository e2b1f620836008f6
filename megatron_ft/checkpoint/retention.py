"""Which checkpoints of a run are kept, which are deleted, and how many are on disk at once.

Decided by --keep-last, --keep-every, --save-epochs and the best validation loss.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import free_bytes
from megatron_ft.weights import directory
from megatron_ft.weights.manifest import Damaged, read_manifest


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What the flags keep: the newest `keep_last` (0: all), multiples of `keep_every`, the best.

    `tracks_best`: whether the run validates, and so has a best checkpoint.
    """

    save_interval: int | None
    keep_last: int
    keep_every: int | None
    tracks_best: bool

    @classmethod
    def of(cls, config: Config) -> "Retention":
        """As the flags ask for."""
        checkpoint = config.checkpoint
        return cls(
            save_interval=checkpoint.save_interval,
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
            tracks_best=bool(config.validation.interval),
        )


def check_free_space(save: Path, needed: int, config: Config, log: Callable[[str], None]) -> None:
    """Compare the free disk space in `save` with checkpoints of `needed` bytes.

    Raises UserError if not even one fits; logs a warning if the most at once do not.
    """
    free = free_bytes(save)
    if free < needed:
        raise UserError(
            f"--save {save}: a checkpoint takes {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
            "free disk space, or give another --save"
        )
    existing = directory.list_iterations(save)
    most = most_at_once(existing, config.training.train_iters, Retention.of(config))
    if free < (most - len(existing)) * needed:
        log(
            f"warning: --save {save}: up to {most} checkpoints of {needed / 1e9:.3f} GB will be on disk at once "
            f"({len(existing)} are now), {free / 1e9:.3f} GB are free; "
            f"free disk space, or lower --keep-last {config.checkpoint.keep_last}"
        )


def delete_superseded(save: Path, config: Config, period: float | None, log: Callable[[str], None]) -> None:
    """Delete checkpoints that the flags do not keep; log those that cannot be deleted.

    `period` is the number of sequences between the saves of --save-epochs. The best checkpoint is
    the one on disk: a later, better one may have failed to be saved.
    """
    iterations = directory.list_iterations(save)
    ends = period_ends(_consumed_samples(save, iterations), period) if period else ()
    best = directory.read_best(save)
    for old in superseded(iterations, Retention.of(config), best=best, period_ends=ends):
        try:
            directory.discard(directory.iteration_directory(save, old))
        except OSError as error:
            log(f"warning: {error.filename} could not be deleted: {error.strerror}")


def _consumed_samples(save: Path, iterations: Sequence[int]) -> dict[int, int]:
    """{iteration: sequences read until then}, without damaged checkpoints."""
    found = {}
    for iteration in iterations:
        with contextlib.suppress(Damaged):
            found[iteration] = read_manifest(directory.iteration_directory(save, iteration)).state["consumed_samples"]
    return found


def superseded(
    iterations: Sequence[int], retention: Retention, *, best: int | None = None, period_ends: Collection[int] = ()
) -> list[int]:
    """Iterations to delete, newest first: not kept by `retention`, `best` or `period_ends`.

    The newest is always kept.

    >>> keep = Retention(save_interval=10, keep_last=2, keep_every=30, tracks_best=True)
    >>> superseded([60, 50, 40, 30, 20, 10], keep, best=10)
    [40, 20]
    """
    if retention.keep_last == 0:
        return []
    newest_first = sorted(iterations, reverse=True)
    kept = {best, *period_ends, *newest_first[:1]}
    every = retention.keep_every
    return [i for i in newest_first[retention.keep_last :] if i not in kept and not (every and i % every == 0)]


def passed_period(before: int, now: int, period: float) -> bool:
    """Whether a multiple of `period` sequences lies between two counts of sequences."""
    return _complete_periods(now, period) > _complete_periods(before, period)


def _complete_periods(samples: int, period: float) -> int:
    """Complete periods in `samples` sequences; 3 is one period of 0.1 x 30 in spite of rounding."""
    return int(samples / period + 1e-9)


def period_ends(samples: Mapping[int, int], period: float) -> set[int]:
    """Of checkpoints {iteration: sequences read}, the first at or past each multiple of `period`.

    >>> sorted(period_ends({1: 8, 2: 16, 3: 24, 4: 32, 5: 40, 6: 48}, 20))
    [3, 5]
    """
    ends: dict[int, int] = {}
    for iteration in sorted(samples):
        ends.setdefault(_complete_periods(samples[iteration], period), iteration)
    return {iteration for number, iteration in ends.items() if number > 0}


def most_at_once(existing: Sequence[int], until: int | None, retention: Retention) -> int:
    """Most checkpoints on disk at once while a run continues from the `existing` ones to `until`.

    While one is written, those that it will supersede are still on disk, and so is the best.
    Without `until`, enough saves are counted for the first to be deleted; with `keep_last` 0 the
    number keeps growing after that.

    >>> keep = Retention(save_interval=100, keep_last=2, keep_every=None, tracks_best=True)
    >>> most_at_once([], 1000, keep)
    4
    """
    now = max(existing, default=0)
    step = retention.save_interval or retention.keep_every or until or 1
    end = max(now, until or now + step * (retention.keep_last + 2))
    coming = sorted({*range(now - now % step + step, end, step), end} - {now})
    kept, most = list(existing), len(existing)
    for iteration in coming:
        kept.append(iteration)
        most = max(most, len(kept))
        gone = superseded(kept, retention)
        kept = [i for i in kept if i not in gone]
    return min(most + retention.tracks_best, len(existing) + len(coming))
