"""What a checkpoint directory looks like, and the steps on it that no crash can leave half done.

    DIR/iter_0000250/                        one whole checkpoint (manifest.json says what it holds)
    DIR/latest_checkpointed_iteration.txt    Megatron's tracker file, replaced last
    DIR/best_checkpointed_iteration.txt      the iteration with the best validation loss
    DIR/iter_0000300.writing-<token>/        being written; becomes iter_0000300 by one rename, or is removed by the next start
    DIR/deleting-iter_0000200/               on its way out
    DIR/damaged-iter_0000250/                found damaged and put aside

A directory called iter_* is whole, or was damaged from outside. The tracker is for other programs and for people: what is found by looking wins.
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
    """Where the owner `token` writes an iteration before it is whole."""
    return save / f"iter_{iteration:07d}.writing-{token}"


def list_iterations(save: Path) -> list[int]:
    """Iterations that have a directory in `save`, newest first; empty when there is no such directory."""
    if not save.is_dir():
        return []
    found = [_ITERATION.fullmatch(entry.name) for entry in save.iterdir() if entry.is_dir()]
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def read_tracker(save: Path) -> str | None:
    """Text of the tracker file, or None."""
    path = save / TRACKER
    return path.read_text(errors="replace").strip() if path.is_file() else None


def read_best(save: Path) -> int | None:
    """Iteration of the best checkpoint, None when none is known."""
    path = save / BEST
    text = path.read_text(errors="replace").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def name_what_is_there(save: Path, newest: int, best: int | None) -> None:
    """Let the tracker and the best mark name these. Files that do so already are left alone."""
    for name, iteration in ((TRACKER, newest), (BEST, best)):
        path = save / name
        if iteration is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != str(iteration).encode():
            replace_file(path, str(iteration).encode())


def commit(save: Path, iteration: int, staging: Path) -> None:
    """Give a finished staging directory its name. The tracker is the caller's next step."""
    final = iteration_directory(save, iteration)
    if final.exists():  # an earlier attempt at this iteration that was found damaged, or was left behind by an override
        discard(final)
    rename_directory(staging, final)


def discard(path: Path) -> None:
    """Take a directory out of sight at once and delete its files in the background."""
    going = path.with_name(f"deleting-{path.name}-{os.getpid()}")
    os.rename(path, going)
    threading.Thread(target=shutil.rmtree, args=(going,), kwargs={"ignore_errors": True}, daemon=True).start()


def put_aside(save: Path, iteration: int) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for whole; its files stay for whoever wants to look."""
    aside = save / f"damaged-iter_{iteration:07d}"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(iteration_directory(save, iteration), aside)
    return aside


def remove_leftovers(save: Path) -> list[str]:
    """Remove what a killed run left half written or half deleted; names of what went."""
    leftovers = [p for p in save.iterdir() if ".writing-" in p.name or p.name.startswith("deleting-")]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in leftovers)
