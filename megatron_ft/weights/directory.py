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

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import rename_directory, replace_file
from megatron_ft.files.hub_cache import leads_outside
from megatron_ft.files.json_file import kind_of

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
METADATA = ".metadata"  # of a torch_dist checkpoint
OWNER = ".owner.json"  # names the training run that writes here
MAX_ITERATION = 10**12
# What a run leaves half written or half deleted, and nothing that anybody else may be writing:
# converters' directories are named iter_0000300.writing-HOST-0123abcd.
_LEFTOVER = re.compile(
    r"iter_[0-9]{7,}\.writing-[0-9a-f]{12}|deleting-iter_[0-9]{7,}(\.writing-[0-9a-f]{12})?(-[0-9]+)?"
)


def iteration_directory(save: Path, iteration: int) -> Path:
    """`DIR/iter_0000250`."""
    return save / f"iter_{iteration:07d}"


def staging_directory(save: Path, iteration: int, token: str) -> Path:
    """Where the owner `token` writes an iteration until it is complete."""
    return save / f"iter_{iteration:07d}.writing-{token}"


def parse_iteration(text: str) -> int | None:
    """The number that `text` is in ASCII digits, None if it is not one from 0 to MAX_ITERATION.

    >>> parse_iteration("0000250"), parse_iteration("\u00b3"), parse_iteration("-1")
    (250, None, None)
    """
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(MAX_ITERATION)):
        return None
    return int(text) if int(text) <= MAX_ITERATION else None


def iteration_of(name: str) -> int | None:
    """The iteration whose directory has this name, None if it is none's.

    >>> iteration_of("iter_0000250"), iteration_of("iter_250"), iteration_of("release")
    (250, None, None)
    """
    number = parse_iteration(name.removeprefix("iter_"))
    return number if number is not None and iteration_directory(Path(), number).name == name else None


def list_iterations(save: Path) -> list[int]:
    """Iterations that have a directory in `save`, newest first; [] if `save` does not exist."""
    if not save.is_dir():
        return []
    found = [iteration_of(entry.name) for entry in save.iterdir() if entry.is_dir()]
    return sorted((number for number in found if number is not None), reverse=True)


def read_tracker(save: Path) -> str | None:
    """The iteration in the tracker file: ASCII digits or "release"; None if it does not exist.

    Anything else is quoted for messages, so that it cannot be taken for an iteration.
    """
    return _read_tracker(save / TRACKER)


def read_best(save: Path) -> int | None:
    """Iteration of the best checkpoint, None when it is unknown."""
    return parse_iteration(_read_tracker(save / BEST) or "")


def _read_tracker(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            content = file.read(100)
    except FileNotFoundError:
        return None
    except OSError as error:
        return repr(error.strerror)
    text = content.decode("utf-8", "replace").strip(" \t\r\n")
    number = parse_iteration(text)
    return text if text == "release" else repr(text) if number is None else str(number)


def check_file_name(name: object, where: str) -> None:
    """Raise UserError unless `name`, found at `where`, is the plain name of a file.

    A file must not name others outside of its directory, by a path or "..".
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0") or _too_long(name):
        shown = repr(name[:80]) if isinstance(name, str) else kind_of(name)
        raise UserError(f"{where} names {shown}, expected the name of a file in the same directory")


def _too_long(name: str) -> bool:
    try:
        return len(os.fsencode(name)) > 255
    except UnicodeEncodeError:  # no file can have this name
        return True


def check_link(file: Path, directory: Path) -> None:
    """Raise UserError when a file of `directory` is a link to somewhere else.

    It may lead into the directory itself, or from a snapshot in the Hub's cache to its blobs.
    """
    if not file.is_symlink():
        return
    cached = [parent for parent in file.absolute().parents if parent.parent.name == "snapshots"]
    if all(leads_outside(file, home) for home in (directory, *cached)):
        raise UserError(
            f"{file}: a link to {os.path.realpath(file)}, which is outside of its directory; "
            "copy the file there if it belongs to the checkpoint"
        )


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
    if os.path.lexists(final):  # an earlier attempt that was damaged, or that an override left behind
        discard(final)
    rename_directory(staging, final)


def discard(path: Path) -> None:
    """Rename a directory at once, and delete its files in the background.

    Of a link to a directory elsewhere, only the link is deleted.
    """
    if path.is_symlink():
        path.unlink()
        return
    deleting = path.with_name(f"deleting-{path.name}-{os.getpid()}")
    os.rename(path, deleting)
    threading.Thread(target=shutil.rmtree, args=(deleting,), kwargs={"ignore_errors": True}, daemon=True).start()


def move_damaged(save: Path, iteration: int) -> Path:
    """Rename a damaged checkpoint to damaged-...: nothing uses it, but it can be inspected."""
    damaged = save / f"damaged-iter_{iteration:07d}"
    if damaged.is_symlink():
        damaged.unlink()
    shutil.rmtree(damaged, ignore_errors=True)
    os.rename(iteration_directory(save, iteration), damaged)
    return damaged


def remove_leftovers(save: Path) -> list[str]:
    """Remove what a killed run left half written or half deleted; the names of what was removed."""
    unfinished = [path for path in save.iterdir() if _LEFTOVER.fullmatch(path.name)]
    for path in unfinished:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in unfinished)
