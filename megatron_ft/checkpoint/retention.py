"""Which checkpoints of a run stay, which go, and how many lie on the disk at once: --keep-last, --keep-every, --save-epochs, the best."""

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import free_bytes
from megatron_ft.weights import directory
from megatron_ft.weights.manifest import Damaged, read_manifest


def check_room(save: Path, needed: int, config: Config, log: Callable[[str], None]) -> None:
    """Raise UserError when a checkpoint of `needed` bytes does not fit into `save`; log a warning when those that will lie there at once do not."""
    free = free_bytes(save)
    if free < needed:
        raise UserError(
            f"--save {save}: a checkpoint takes {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
            "free some space, or give a --save elsewhere"
        )
    there = directory.list_iterations(save)
    most = most_at_once(
        there,
        config.training.train_iters,
        save_interval=config.checkpoint.save_interval,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
        best=bool(config.validation.interval),
    )
    if free < (most - len(there)) * needed:
        log(
            f"warning: --save {save}: up to {most} checkpoints of {needed / 1e9:.3f} GB will lie there at once ({len(there)} do), "
            f"{free / 1e9:.3f} GB are free; free some space, or lower --keep-last {config.checkpoint.keep_last}"
        )


def delete_superseded(save: Path, config: Config, period: float | None, log: Callable[[str], None]) -> None:
    """Delete what the flags do not keep; `period` is rows between --save-epochs's saves. What cannot be deleted is said, and no reason
    to stop saving. The best is the one on disk: a better one may have failed to be saved."""
    iterations = directory.list_iterations(save)
    ends = period_ends(_consumed_samples(save, iterations), period) if period else ()
    best = directory.read_best(save)
    for old in superseded(
        iterations, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every, best=best, period_ends=ends
    ):
        try:
            directory.discard(directory.iteration_directory(save, old))
        except OSError as error:
            log(f"warning: {error.filename} could not be deleted: {error.strerror}")


def _consumed_samples(save: Path, iterations: list[int]) -> dict[int, int]:
    """Rows that each checkpoint's run had seen, as their manifests say; a damaged one says nothing."""
    found = {}
    for iteration in iterations:
        with contextlib.suppress(Damaged):
            found[iteration] = read_manifest(directory.iteration_directory(save, iteration)).state["consumed_samples"]
    return found


def superseded(
    iterations: list[int],
    *,
    keep_last: int,
    keep_every: int | None,
    best: int | None,
    period_ends: Collection[int] = (),
) -> list[int]:
    """Iterations that may go: not among the newest `keep_last` (0 keeps all), no multiple of `keep_every`, not the best, none of `period_ends`.

    >>> superseded([60, 50, 40, 30, 20, 10], keep_last=2, keep_every=30, best=10)
    [40, 20]
    """
    if keep_last == 0:
        return []
    newest_first = sorted(iterations, reverse=True)
    kept = {best, *period_ends, *newest_first[:1]}  # the newest stays, whatever is asked
    return [i for i in newest_first[keep_last:] if i not in kept and not (keep_every and i % keep_every == 0)]


def passed_period(before: int, now: int, period: float) -> bool:
    """Whether a multiple of `period` rows lies between the two counts of rows."""
    return _periods(now, period) > _periods(before, period)


def _periods(samples: int, period: float) -> int:
    """How many whole periods of `period` rows `samples` rows make; rounding errors of 0.1 x 30 and the like do not count."""
    return int(samples / period + 1e-9)


def period_ends(samples: dict[int, int], period: float) -> set[int]:
    """Of checkpoints {iteration: consumed samples}, the first at or past each multiple of `period` rows.

    >>> sorted(period_ends({1: 8, 2: 16, 3: 24, 4: 32, 5: 40, 6: 48}, 20))
    [3, 5]
    """
    ends: dict[int, int] = {}
    for iteration in sorted(samples):
        ends.setdefault(_periods(samples[iteration], period), iteration)
    return {iteration for number, iteration in ends.items() if number > 0}


def most_at_once(
    there: list[int],
    until: int | None,
    *,
    save_interval: int | None,
    keep_last: int,
    keep_every: int | None,
    best: bool,
) -> int:
    """Most checkpoints that lie in a directory at once while a run goes on from the newest iteration `there` to `until`.

    One that is being written lies beside those it will supersede, and the best, where one is looked for, beside the newest.
    Without `until`, as many saves are looked at as it takes to delete the first: with `keep_last` 0 they only grow from there.

    >>> most_at_once([], 1000, save_interval=100, keep_last=2, keep_every=None, best=True)
    4
    """
    now = max(there, default=0)
    step = save_interval or keep_every or until or 1
    end = max(now, until or now + step * (keep_last + 2))
    coming = sorted({*range(now - now % step + step, end, step), end} - {now})
    kept, most = list(there), len(there)
    for iteration in coming:
        kept.append(iteration)
        most = max(most, len(kept))
        gone = superseded(kept, keep_last=keep_last, keep_every=keep_every, best=None)
        kept = [i for i in kept if i not in gone]
    return min(most + best, len(there) + len(coming))
