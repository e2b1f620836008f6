"""The layout of a checkpoint directory, and the steps on it that no crash can leave half done.

    DIR/iter_0000250/                        one complete checkpoint, listed in its manifest.json
    DIR/latest_checkpointed_iteration.txt    Megatron's tracker file, replaced last
    DIR/best_checkpointed_iteration.txt      the iteration with the best validation loss
    DIR/iter_0000300.writing-<token>/        being written; renamed to iter_0000300 when complete,
                                             or removed by the next start
    DIR/deleting-iter_0000200/               being deleted
    DIR/damaged-iter_0000250/                found damaged and renamed

A directory named iter_* is complete, or was damaged from outside. The tracker is for other programs
and for people: the directory's contents take precedence.
"""

import os
import re
import shutil
import threading
from pathlib import Path

from megatron_ft.files.atomic import rename_directory, replace_file

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
OWNER = ".owner.json"  # names the training run that writes here
_ITERATION = re.compile(r"iter_(\d{7,})")


def iteration_directory(save: Path, iteration: int) -> Path:
    """`DIR/iter_0000250`."""
    return save / f"iter_{iteration:07d}"


def staging_directory(save: Path, iteration: int, token: str) -> Path:
    """Where the owner `token` writes an iteration until it is complete."""
    return save / f"iter_{iteration:07d}.writing-{token}"


def list_iterations(save: Path) -> list[int]:
    """Iterations that have a directory in `save`, newest first; [] if `save` does not exist."""
    if not save.is_dir():
        return []
    found = [_ITERATION.fullmatch(entry.name) for entry in save.iterdir() if entry.is_dir()]
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def read_tracker(save: Path) -> str | None:
    """Text of the tracker file, None when it does not exist."""
    path = save / TRACKER
    return path.read_text(errors="replace").strip() if path.is_file() else None


def read_best(save: Path) -> int | None:
    """Iteration of the best checkpoint, None when it is unknown."""
    path = save / BEST
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def write_trackers(save: Path, newest: int, best: int | None) -> None:
    """Write the tracker files of the newest and the best iteration, unless they are up to date."""
    for name, iteration in ((TRACKER, newest), (BEST, best)):
        path = save / name
        if iteration is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != str(iteration).encode():
            replace_file(path, str(iteration).encode())


def commit(save: Path, iteration: int, staging: Path) -> None:
    """Rename a complete staging directory to its final name. The caller then writes the tracker."""
    final = iteration_directory(save, iteration)
    if final.exists():  # an earlier attempt that was damaged, or that an override left behind
        discard(final)
    rename_directory(staging, final)


def discard(path: Path) -> None:
    """Rename a directory at once, and delete its files in the background."""
    deleting = path.with_name(f"deleting-{path.name}-{os.getpid()}")
    os.rename(path, deleting)
    threading.Thread(target=shutil.rmtree, args=(deleting,), kwargs={"ignore_errors": True}, daemon=True).start()


def move_damaged(save: Path, iteration: int) -> Path:
    """Rename a damaged checkpoint to damaged-...: nothing uses it, but it can be inspected."""
    damaged = save / f"damaged-iter_{iteration:07d}"
    shutil.rmtree(damaged, ignore_errors=True)
    os.rename(iteration_directory(save, iteration), damaged)
    return damaged


def remove_leftovers(save: Path) -> list[str]:
    """Remove what a killed run left half written or half deleted; the names of what was removed."""
    leftovers = [p for p in save.iterdir() if ".writing-" in p.name or p.name.startswith("deleting-")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in leftovers)
